"""The main job on real input: train a small network on handwritten digits, compress it through the service, score it.

Run it with `make demo`. It leaves its files in `demo-output/`.
"""

import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor, nn
from torch.nn import functional as F

OUTPUT = Path("demo-output")
MODEL, DATA, SMALL = OUTPUT / "digits.pt", OUTPUT / "train.npz", OUTPUT / "digits-small.pt"
SERVICE_DIR, SERVICE_LOG = OUTPUT / "service", OUTPUT / "service.log"
RANKPRESS = Path(sys.executable).parent / "rankpress"

SEED = 0
EPOCHS, BATCH_SIZE, LEARNING_RATE = 20, 64, 2e-3
TEST_IMAGES, VALIDATION_IMAGES = 450, 150
MAX_MACS_FRACTION = 0.3
MAX_LOST_POINTS = 1.5
START_SECONDS, STOP_SECONDS = 60, 40


def main() -> int:
    """Make the whole trip and say how it went."""
    OUTPUT.mkdir(exist_ok=True)
    started = time.monotonic()
    say("1. Training a convolutional network on scikit-learn's handwritten digits (real scans, 8 × 8 pixels)")
    parts = digits()
    np.savez(DATA, **parts)
    network = train(torch.from_numpy(parts["inputs"]), torch.from_numpy(parts["targets"]))
    torch.jit.script(network).save(str(MODEL))
    print(f"   {MODEL}: {MODEL.stat().st_size:,} bytes; {DATA}: {len(parts['inputs'])} training images")

    say("2. Starting the service")
    with service() as url:
        command = [RANKPRESS, "compress", MODEL, "--data", DATA, "--max-macs-fraction", str(MAX_MACS_FRACTION)]
        command += ["--output", SMALL, "--name", "digits"]
        say(f"3. {' '.join(['rankpress', *map(str, command[1:])])}\n")
        finished = subprocess.run(command, env={**os.environ, "RANKPRESS_URL": url}, check=False)
    if finished.returncode != 0:
        return fail(f"rankpress compress ended with exit code {finished.returncode}; see {SERVICE_LOG}")

    say("4. Scoring both files on the test images, in a fresh Python with nothing but torch and numpy")
    before, after = score(MODEL), score(SMALL)
    lost_points = 100 * (before - after)
    print(f"   {MODEL}: {100 * before:.2f} %   {SMALL}: {100 * after:.2f} %   lost: {lost_points:.2f} points")
    print(f"   the whole demo took {time.monotonic() - started:.0f} s")
    if lost_points > MAX_LOST_POINTS:
        return fail(f"{lost_points:.2f} points of test accuracy were lost; at most {MAX_LOST_POINTS} are allowed")
    say_how_to_go_on()
    return 0


def digits() -> dict[str, NDArray[np.float32] | NDArray[np.int64]]:
    """The images as N×1×8×8 with values from 0 to 1, in three parts that share no image."""
    images, targets = load_digits(return_X_y=True)
    inputs = (images / 16).astype(np.float32).reshape(-1, 1, 8, 8)
    targets = targets.astype(np.int64)
    rest, test, rest_targets, test_targets = train_test_split(
        inputs, targets, test_size=TEST_IMAGES, random_state=SEED, stratify=targets
    )
    training, validation, training_targets, validation_targets = train_test_split(
        rest, rest_targets, test_size=VALIDATION_IMAGES, random_state=SEED, stratify=rest_targets
    )
    return {
        "inputs": training,
        "targets": training_targets,
        "val_inputs": validation,
        "val_targets": validation_targets,
        "test_inputs": test,
        "test_targets": test_targets,
    }


class DigitsNet(nn.Module):
    """Three convolutions and two linear layers."""

    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential(
            nn.Conv2d(1, 32, 3, padding=1),
            nn.BatchNorm2d(32),
            nn.ReLU(),
            nn.Conv2d(32, 64, 3, padding=1),
            nn.BatchNorm2d(64),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Conv2d(64, 64, 3, padding=1),
            nn.ReLU(),
        )
        self.classifier = nn.Sequential(
            nn.Flatten(), nn.Linear(64 * 4 * 4, 128), nn.ReLU(), nn.Dropout(0.3), nn.Linear(128, 10)
        )

    def forward(self, images: Tensor) -> Tensor:
        """Class scores."""
        scores: Tensor = self.classifier(self.features(images))
        return scores


def train(inputs: Tensor, targets: Tensor) -> nn.Module:
    """Adam with a cosine schedule and shifts by one pixel, seeded."""
    torch.manual_seed(SEED)
    network = DigitsNet()
    optimizer = torch.optim.Adam(network.parameters(), lr=LEARNING_RATE, weight_decay=1e-4)
    steps = EPOCHS * -(-len(inputs) // BATCH_SIZE)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for _ in range(EPOCHS):
        for batch in torch.randperm(len(inputs)).split(BATCH_SIZE):
            down, right = (int(shift) for shift in torch.randint(-1, 2, (2,)))
            images = F.pad(inputs[batch], (1, 1, 1, 1))[:, :, 1 + down : 9 + down, 1 + right : 9 + right]
            optimizer.zero_grad()
            F.cross_entropy(network(images), targets[batch]).backward()
            optimizer.step()
            schedule.step()
    return network.eval()


@contextmanager
def service() -> Iterator[str]:
    """`rankpress serve` on a free port; yields its URL."""
    command = [RANKPRESS, "serve", "--data", SERVICE_DIR, "--port", "0"]
    with SERVICE_LOG.open("w", encoding="utf-8") as log:
        process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, start_new_session=True)
    try:
        url = wait_for_url(process)
        print(f"   it answers at {url}, keeps its data in {SERVICE_DIR} and logs to {SERVICE_LOG}")
        yield url
    finally:
        process.terminate()
        try:
            process.wait(STOP_SECONDS)
        except subprocess.TimeoutExpired:
            process.kill()


def wait_for_url(process: subprocess.Popen[bytes]) -> str:
    """Read the URL from what the service prints once it is ready."""
    deadline = time.monotonic() + START_SECONDS
    while time.monotonic() < deadline and process.poll() is None:
        found = re.search(r"listens on (http://\S+)", SERVICE_LOG.read_text(encoding="utf-8"))
        if found:
            return found[1]
        time.sleep(0.1)
    raise SystemExit(f"the service did not start:\n{SERVICE_LOG.read_text(encoding='utf-8')}")


def score(model: Path) -> float:
    """Test accuracy of a file, measured by a process that cannot see this project."""
    script = Path(__file__).with_name("score.py")
    command = [sys.executable, "-I", script, model, DATA]
    found = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    accuracy: float = json.loads(found.stdout)["accuracy"]
    return accuracy


def say(text: str) -> None:
    print(f"\n{text}", flush=True)


def fail(text: str) -> int:
    print(f"\nDEMO FAILED: {text}", file=sys.stderr)
    return 1


def say_how_to_go_on() -> None:
    rankpress = os.path.relpath(RANKPRESS)
    say("How to go on: start the service again, and leave it running")
    print(f"   {rankpress} serve --data {SERVICE_DIR}")
    say("then, in another terminal, look at the job of this demo or compress a network of your own")
    print(f"   {rankpress} jobs")
    print(f"   {rankpress} compress YOUR_MODEL.pt --data YOUR_DATA.npz --max-macs-fraction 0.5")


if __name__ == "__main__":
    sys.exit(main())
