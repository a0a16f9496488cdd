"""Summaries of scores under perturbations: lost accuracy, and corruption errors relative to a baseline.

A network with the higher clean accuracy is often more accurate under corruptions too, even if it loses more by them.
Only the relative corruption error removes the clean accuracy: it measures what the corruptions cost.
"""

import statistics
from collections.abc import Sequence

from spikedistill.data.noise import SEVERITIES
from spikedistill.errors import ConfigError
from spikedistill.evaluate.immunity import Score


def mean_accuracy(scores: Sequence[Score], network: str, name: str) -> float:
    """Mean accuracy (percent) of a network over the five severities of a perturbation, rounded to 1e-9.

    Raises:
        ConfigError: if the scores do not hold each severity exactly once.
    """
    found = {score.severity: score.accuracy for score in scores if score.network == network and score.name == name}
    if sorted(found) != list(SEVERITIES):
        raise ConfigError(f"The scores hold {len(found)} severities of '{name}' for '{network}': expected 5.")
    return round(statistics.fmean(found.values()), 9)


def clean_accuracy(scores: Sequence[Score], network: str, kind: str = "clean") -> float:
    """Accuracy (percent) of a network on unchanged images: all of them, or with kind ``attacked`` the attacked ones.

    Raises:
        ConfigError: if the scores do not hold it.
    """
    found = [score.accuracy for score in scores if score.network == network and score.kind == kind]
    if not found:
        raise ConfigError(f"The scores hold no clean accuracy of '{network}': measure it first.")
    return found[0]


def fall(scores: Sequence[Score], network: str, name: str) -> float:
    """Points that a perturbation costs: clean accuracy minus the mean over severities; negative if accuracy rises.

    Both are on the same images. The result is rounded to 1e-9, so that equal losses compare as equal.

    Raises:
        ConfigError: if the scores do not hold what is needed.
    """
    attack = any(score.name == name and score.kind in ("attack", "gradient") for score in scores)
    clean = clean_accuracy(scores, network, "attacked" if attack else "clean")
    return round(clean - mean_accuracy(scores, network, name), 9)


def names_of(scores: Sequence[Score], network: str, kind: str) -> list[str]:
    """The perturbations of a kind that a network was measured under, in order."""
    return list(dict.fromkeys(score.name for score in scores if score.network == network and score.kind == kind))


def shared(scores: Sequence[Score], network: str, other: str, kind: str) -> list[str]:
    """The perturbations of a kind that both networks were measured under, in order."""
    theirs = set(names_of(scores, other, kind))
    return [name for name in names_of(scores, network, kind) if name in theirs]


def comparable(scores: Sequence[Score], network: str, baseline: str, kind: str) -> list[str]:
    """The shared perturbations that cost the baseline accuracy: only those have a relative corruption error.

    Saturation, for instance, costs nothing on grey images.
    """
    return [name for name in shared(scores, network, baseline, kind) if fall(scores, baseline, name) > 0]


def mean_corruption_error(scores: Sequence[Score], network: str, baseline: str, kind: str = "natural") -> float:
    """Error over all severities in percent of a baseline's, mean over perturbations, after mCE (arXiv 1903.12261).

    The paper uses 15 corruptions including noise, and AlexNet as baseline. Its numbers cannot be compared with these.

    Raises:
        ConfigError: if the scores hold no perturbation of this kind, or not this network.
    """
    names = names_of(scores, network, kind)
    if not names:
        raise ConfigError(f"The scores hold no '{kind}' of '{network}': measure it first.")

    def error(who: str, name: str) -> float:
        return 100.0 - mean_accuracy(scores, who, name)

    return 100.0 * statistics.fmean(error(network, name) / max(1e-9, error(baseline, name)) for name in names)


def relative_corruption_error(scores: Sequence[Score], network: str, baseline: str, kind: str = "natural") -> float:
    """Lost accuracy in percent of a baseline's loss: relative mCE (arXiv 1903.12261, section 4).

    For each perturbation the rise of the error above the clean error, summed over severities, is divided by the
    baseline's. The result is the mean over perturbations. Below 100 the network loses less than the baseline,
    whatever their clean accuracies. The paper uses 15 corruptions and AlexNet as baseline. If a perturbation costs the
    baseline nothing, the ratio is not defined. The paper does not say what to do then; our choice is to leave the
    perturbation out (``comparable``).

    Raises:
        ConfigError: if no perturbation of that kind, measured for both, costs the baseline accuracy.
    """
    names = comparable(scores, network, baseline, kind)
    if not names:
        raise ConfigError(
            f"No '{kind}' that was measured for '{network}' and '{baseline}' costs '{baseline}' accuracy, so the"
            " relative corruption error is not defined: measure other kinds, or name another baseline."
        )
    return 100.0 * statistics.fmean(fall(scores, network, name) / fall(scores, baseline, name) for name in names)
