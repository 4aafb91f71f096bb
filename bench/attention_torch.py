"""PyTorch's scaled_dot_product_attention at the shapes of bench/attention_gpu.cu: median times by CUDA events, causal, bf16.

    python bench/attention_torch.py

q, k and v are views of one packed buffer (B, T, NH + 2*NKV, HS), as there. FLOPs: 4 B NH T T HS / 2 forward, 2.5 times that backward.
"""
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

SHAPES = [(64, 1024, 12, 12, 64), (8, 2048, 32, 8, 64), (64, 256, 6, 6, 64), (32, 2048, 2, 2, 128), (4, 2048, 8, 8, 256)]
BACKENDS = {"flash": SDPBackend.FLASH_ATTENTION, "cudnn": SDPBackend.CUDNN_ATTENTION}


def median_ms(work, runs=20):
    times = []
    for i in range(runs + 3):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        work()
        end.record()
        end.synchronize()
        if i >= 3:
            times.append(start.elapsed_time(end))
    return sorted(times)[len(times) // 2]


def main():
    print(f"torch {torch.__version__}, {torch.cuda.get_device_name()}")
    print(f"{'':8}{'B':>4} {'T':>5} {'NH':>3} {'NKV':>3} {'HS':>3} {'forward ms':>12} {'TFLOP/s':>9} {'backward ms':>12} {'TFLOP/s':>9}")
    for B, T, NH, NKV, HS in SHAPES:
        packed = torch.randn(B, T, NH + 2 * NKV, HS, device="cuda", dtype=torch.bfloat16)
        q, k, v = (x.transpose(1, 2).requires_grad_() for x in packed.split([NH, NKV, NKV], dim=2))
        flops = 4 * B * NH * T * T * HS / 2
        for name, backend in BACKENDS.items():
            try:
                with sdpa_kernel(backend):
                    def attend():
                        return torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=NH != NKV)
                    forward = median_ms(attend)
                    out = attend()
                    dout = torch.randn_like(out)
                    backward = median_ms(lambda: torch.autograd.grad(out, (q, k, v), dout, retain_graph=True))
            except RuntimeError as error:
                print(f"{name:8}{B:4} {T:5} {NH:3} {NKV:3} {HS:3}  not run: {str(error).splitlines()[0][:80]}")
                continue
            print(f"{name:8}{B:4} {T:5} {NH:3} {NKV:3} {HS:3} {forward:12.3f} {flops / forward * 1e-9:9.0f} "
                  f"{backward:12.3f} {2.5 * flops / backward * 1e-9:9.0f}", flush=True)


if __name__ == "__main__":
    main()
