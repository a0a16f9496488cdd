"""An exported student without torch and without this package: numpy and onnxruntime are enough.

    spikedistill export digits-resnet20-1x4 --out .
    python examples/onnx_student.py digits-resnet20-1x4-step.onnx images.npy

images.npy holds bytes [N, C, H, W], or event frames [N, T, 2, H, W]. A sample is answered as soon as its likeliest
class is more likely than --confidence.
"""

import argparse
import json

import numpy as np
import onnxruntime

KINDS = {"tensor(float)": np.float32, "tensor(double)": np.float64}


class StepByStep:
    """A student in the form ``step``: an image and a state go in, logits and the next state come out."""

    def __init__(self, path: str) -> None:
        self.session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
        facts = self.session.get_modelmeta().custom_metadata_map
        self.timesteps, self.classes = int(facts["timesteps"]), json.loads(facts["classes"])
        self.state = json.loads(facts["state"])

    def initial_state(self, samples: int) -> dict[str, np.ndarray]:
        """The state before the first step: one value, or one per channel."""
        made = {}
        for one, known in zip(self.session.get_inputs()[1:], self.state):
            value = np.reshape(known["fresh"], (-1, *[1] * (len(one.shape) - 2)))
            made[one.name] = np.broadcast_to(value, (samples, *one.shape[1:])).astype(KINDS[one.type])
        return made

    def answer(self, pixels: np.ndarray, confidence: float) -> tuple[int, int]:
        """The class of one sample, and the number of time steps that it took."""
        state, total = self.initial_state(1), 0.0
        for t in range(1, self.timesteps + 1):
            image = pixels[t - 1] if pixels.ndim == 4 else pixels
            given = {"image": image[None].astype(np.float32) / 255, **state}
            logits, *after = self.session.run(None, given)
            state = {one["input"]: value for one, value in zip(self.state, after)}
            total = total + logits[0]
            powers = np.exp(total / t - np.max(total / t))
            if powers.max() / powers.sum() > confidence:
                break
        return int(np.argmax(total)), t


def main() -> None:
    """Print the class and the number of steps of every sample."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("student")
    parser.add_argument("images")
    parser.add_argument("--confidence", type=float, default=1.0)
    given = parser.parse_args()
    student = StepByStep(given.student)
    for number, pixels in enumerate(np.load(given.images, allow_pickle=False)):
        label, steps = student.answer(pixels, given.confidence)
        print(f"{number}\t{student.classes[label]}\t{steps} of {student.timesteps} steps")


if __name__ == "__main__":
    main()
