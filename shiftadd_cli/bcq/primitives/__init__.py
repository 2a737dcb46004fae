"""The primitives by name. To add one, add a module here, an entry below, and its name and bits to `bcq.choices`."""

from __future__ import annotations

from shiftadd_cli.bcq.choices import Primitive as PrimitiveName
from shiftadd_cli.bcq.primitives.base import Primitive
from shiftadd_cli.bcq.primitives.planes import BinaryPlanes
from shiftadd_cli.bcq.primitives.shifts import ShiftLayers
from shiftadd_cli.bcq.primitives.trellis import TrellisPlanes

PRIMITIVES: dict[PrimitiveName, Primitive] = {
    primitive.name: primitive
    for primitive in (
        BinaryPlanes(),
        TrellisPlanes("trellis1", 1),
        TrellisPlanes("trellis2", 2),
        ShiftLayers("shift1", 1),
        ShiftLayers("shift2", 2),
    )
}
