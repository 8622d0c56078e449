"""Where there is no GPU, Triton's interpreter can run the kernels on the CPU: with TRITON_INTERPRET=1 and not else."""

import os

if os.environ.get("TRITON_INTERPRET") == "1":
    import numpy
    from triton.runtime import interpreter

    try:
        int(numpy.zeros(1))  # type: ignore[call-overload]
    except TypeError:  # numpy >= 2.4; Triton 3.5's interpreter makes loop bounds of one number that way
        shape_tensor = interpreter._patch_lang_tensor

        def with_scalar_bounds(tensor: object, *others: object) -> None:
            shape_tensor(tensor, *others)
            tensor.__index__ = lambda self: int(self.handle.data.item())  # type: ignore[attr-defined]

        interpreter._patch_lang_tensor = with_scalar_bounds
