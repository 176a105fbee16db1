"""What a GPU's driver and a process take of its memory, beside the shares that fxmem takes off.

python benchmarks/context.py
"""

import torch

from fxmem.basics.gpus import find_gpu
from fxmem.reports.fits import CONTEXT, DRIVER_SHARE


def main() -> None:
    if not torch.cuda.is_available():
        raise SystemExit("no CUDA device here")
    name = torch.cuda.get_device_name()
    gpu = find_gpu(name)
    x = torch.randn(4096, 4096, device="cuda", requires_grad=True)
    (x @ x).sum().backward()
    torch.cuda.synchronize()
    free, total = torch.cuda.mem_get_info()
    context = total - free - torch.cuda.memory_reserved()
    print(f"{name}, torch {torch.__version__}")
    if gpu is not None:
        share = 100 * (1 - total / gpu.nbytes)
        print(f"driver   {gpu.nbytes - total} bytes, {share:.2f} % (taken off: {DRIVER_SHARE} %)")
    print(f"process  {context} bytes (taken off: {CONTEXT})")


if __name__ == "__main__":
    main()
