"""Which axis of a weight its outputs lie along, and which its inputs."""

from worker.engine.forms.geometry import TRANSPOSED, Geometry


def output_axis(geometry: Geometry) -> int:
    """Axis of the outputs: 0, but 1 where the operator has its inputs first."""
    inputs_first = geometry.kind in {"matmul", "embedding", *TRANSPOSED}
    return 1 if inputs_first and len(geometry.weight_shape) > 1 else 0


def input_axis(geometry: Geometry) -> int:
    """Axis of the inputs; for a weight of one axis there is none, and 1 is out of its bounds."""
    return 1 - output_axis(geometry)
