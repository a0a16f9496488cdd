"""What scores under noise amount to: accuracy that is lost, and corruption errors beside a baseline.

A network that is the more accurate on clean images stands higher under most corruptions too, though it may lose more
by them. Only the relative corruption error takes the clean accuracy away: it says what the corruptions cost.
"""

import statistics
from collections.abc import Sequence

from spikedistill.data.noise import SEVERITIES
from spikedistill.errors import ConfigError
from spikedistill.evaluate.immunity import Score


def mean_accuracy(scores: Sequence[Score], network: str, name: str) -> float:
    """Accuracy (percent) of a network under a perturbation, mean over the five severities, rounded to a billionth.

    Raises:
        ConfigError: if the scores do not hold each severity once.
    """
    found = {score.severity: score.accuracy for score in scores if score.network == network and score.name == name}
    if sorted(found) != list(SEVERITIES):
        raise ConfigError(f"The scores hold {len(found)} severities of '{name}' for '{network}': expected 5.")
    return round(statistics.fmean(found.values()), 9)


def clean_accuracy(scores: Sequence[Score], network: str, kind: str = "clean") -> float:
    """Accuracy (percent) of a network on images as they are: all, or with kind ``attacked`` those that are attacked.

    Raises:
        ConfigError: if the scores do not hold it.
    """
    found = [score.accuracy for score in scores if score.network == network and score.kind == kind]
    if not found:
        raise ConfigError(f"The scores hold no clean accuracy of '{network}': measure it first.")
    return found[0]


def fall(scores: Sequence[Score], network: str, name: str) -> float:
    """Points that a perturbation costs: clean accuracy less the mean over severities; negative where it gains.

    Both are of the same images. Rounded to a billionth, so that equal losses compare as equal.

    Raises:
        ConfigError: if the scores do not hold what is needed.
    """
    attack = any(score.name == name and score.kind in ("attack", "gradient") for score in scores)
    clean = clean_accuracy(scores, network, "attacked" if attack else "clean")
    return round(clean - mean_accuracy(scores, network, name), 9)


def names_of(scores: Sequence[Score], network: str, kind: str) -> list[str]:
    """The perturbations of a kind that a network was measured under, in their order."""
    return list(dict.fromkeys(score.name for score in scores if score.network == network and score.kind == kind))


def shared(scores: Sequence[Score], network: str, other: str, kind: str) -> list[str]:
    """The perturbations of a kind that both networks were measured under, in their order."""
    theirs = set(names_of(scores, other, kind))
    return [name for name in names_of(scores, network, kind) if name in theirs]


def comparable(scores: Sequence[Score], network: str, baseline: str, kind: str) -> list[str]:
    """The shared perturbations that cost the baseline accuracy: only those have a relative corruption error.

    Saturation, for instance, costs nothing on grey images.
    """
    return [name for name in shared(scores, network, baseline, kind) if fall(scores, baseline, name) > 0]


def mean_corruption_error(scores: Sequence[Score], network: str, baseline: str, kind: str = "natural") -> float:
    """Errors over all severities in percent of a baseline's, mean over perturbations, after mCE (arXiv 1903.12261).

    That one takes 15 corruptions, noises among them, and AlexNet as baseline: its figures are others than these.

    Raises:
        ConfigError: if the scores hold nothing of that kind, or no such network.
    """
    names = names_of(scores, network, kind)
    if not names:
        raise ConfigError(f"The scores hold no '{kind}' of '{network}': measure it first.")

    def error(who: str, name: str) -> float:
        return 100.0 - mean_accuracy(scores, who, name)

    return 100.0 * statistics.fmean(error(network, name) / max(1e-9, error(baseline, name)) for name in names)


def relative_corruption_error(scores: Sequence[Score], network: str, baseline: str, kind: str = "natural") -> float:
    """What perturbations cost, in percent of what they cost a baseline: relative mCE (arXiv 1903.12261, section 4).

    For each perturbation the rise of the error above the clean one, summed over severities, is divided by the
    baseline's; the mean over perturbations is taken. Below 100 the network loses less than the baseline, whatever
    either has on clean images. Theirs has 15 corruptions and AlexNet as baseline. A perturbation that costs the
    baseline nothing has no such ratio, of which the paper is silent: it is left out here (``comparable``).

    Raises:
        ConfigError: if no perturbation of that kind, measured for both, costs the baseline accuracy.
    """
    names = comparable(scores, network, baseline, kind)
    if not names:
        raise ConfigError(
            f"No '{kind}' that was measured for '{network}' and '{baseline}' costs '{baseline}' accuracy, so there is"
            " no relative corruption error: measure others, or name another baseline."
        )
    return 100.0 * statistics.fmean(fall(scores, network, name) / fall(scores, baseline, name) for name in names)
