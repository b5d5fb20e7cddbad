"""Time and memory of one case, each in a process of its own: `python tools/measure.py CASE [name=value ...]`.

It prints one line of JSON; without words it lists the cases. The benchmark notebooks call it through `measure`.
Memory is the growth of the largest resident size in one run. It takes a fresh process, because what an earlier case
touched and freed would hide what a later one needs; and one that gives freed memory back at once. Time is measured in
another, whose heap has grown as that of any program that has loaded data.
"""
import json
import os
import resource
import subprocess
import sys
from pathlib import Path


def embeddings(rows, dim, M, requires_grad=True, target=None, candidates=None):
    "Random unit rows; the target's are the candidates."
    import torch
    from gated_symile import generator, unit
    sizes = [candidates if m == target else rows for m in range(M)]
    return [unit(torch.randn(n, dim, generator=generator(m))).requires_grad_(requires_grad)
            for m, n in enumerate(sizes)]


def step(objective, e, loss=None):
    "A loss and all its gradients."
    import torch
    leaves = [*e, *(p for p in objective.parameters() if p.requires_grad)]
    return lambda: torch.autograd.grad(loss() if loss else objective(e), leaves, allow_unused=True)


def gated_objective(M, D, compile=False):
    "Gated Symile with its defaults."
    import torch
    from gated_symile import GatedSymile, ModalityGate
    torch.manual_seed(0)
    objective = GatedSymile(ModalityGate(M, D))
    if compile: objective.compile()
    return objective


def symile(B=128, D=256, M=3, negatives="candidates"):
    "Symile's loss and gradients"
    from gated_symile import Symile
    return step(Symile(negatives), embeddings(B, D, M))


def gated(B=128, D=256, M=3, compile=False, factorised=None):
    "Gated Symile's loss and gradients; factorised: which form to take whatever M, that one or the definition in pieces"
    import gated_symile.gate.factorised as room
    if factorised is not None: room.MANY = 99 if factorised else 0
    return step(gated_objective(M, D, compile), embeddings(B, D, M))


def written_out(B=128, D=256, M=3):
    "the same from the definition: gated embeddings of all pairs as one tensor"
    import torch
    from gated_symile import dvs
    from gated_symile.contrastive import mean_over_targets
    objective, e = gated_objective(M, D), embeddings(B, D, M)
    def scores(t): return dvs(M, D) * torch.einsum("jd,ijd->ij", e[t], objective.gate.gated(e, t).prod(2))
    return step(objective, e, lambda: mean_over_targets(lambda t: objective.logit_scale() * scores(t), M))


def package(B=128, D=256, M=3):
    "the PyPI package symile with all combinations (n_squared), loss and gradients"
    import torch
    from gated_symile import dvs
    from symile import Symile
    e, scale, loss = embeddings(B, D, M), torch.tensor(dvs(M, D)), Symile("n_squared")
    return lambda: torch.autograd.grad(loss(e, scale), e)


def search(N=100_000, B=256, D=256, M=3, k=10, gate=True, compile=False):
    "the best k of N candidates for B queries"
    import torch
    from gated_symile import Symile, top_k
    e = embeddings(B, D, M, requires_grad=False, target=0, candidates=N)
    score = gated_objective(M, D).score if gate else Symile().score
    if compile: score = torch.compile(score)
    return lambda: top_k(score, e, 0, k)


def product(B=512, D=256):
    "one matrix product: the machine's own ceiling"
    import torch
    a, b = torch.randn(B, D), torch.randn(B, D)
    return lambda: a @ b.T


CASES = {f.__name__: f for f in (symile, gated, written_out, package, search, product)}


def peak(reset=False):
    "Largest resident memory of this process in MiB, so far or, on Linux, since the last `reset`."
    try:
        if reset: Path("/proc/self/clear_refs").write_text("5")
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM")) / 1024
    except (OSError, StopIteration):
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (1024 if sys.platform != "darwin" else 2**20)


def one(case, what, seconds=1., threads=2, **options):
    "One measurement in this process."
    import torch
    torch.set_num_threads(int(threads))
    if what == "memory":
        small = {"B": 16} | ({"N": 1000} if case == "search" else {})
        # what torch, or its compiler, needs once
        CASES[case](**options | ({} if options.get("compile") else small))()
        run, before = CASES[case](**options), peak(reset=True)
        run()
        return dict(MiB=peak() - before)
    from torch.utils.benchmark import Timer
    # freed at once: from now on the heap keeps what is freed
    torch.empty(7 * 2**20).fill_(0)
    run = CASES[case](**options)
    run()
    times = Timer("run()", globals={"run": run}, num_threads=int(threads)).blocked_autorange(min_run_time=seconds)
    return dict(ms=1e3 * times.median, spread_ms=1e3 * times.iqr, runs=len(times.times))


def measure(case, memory=True, **options):
    "Time and memory of one case, as a dict."
    found = dict(case=case, **{k: v for k, v in options.items() if k not in ("seconds", "threads")})
    for what in ("time", "memory")[:1 + memory]:
        words = [sys.executable, str(Path(__file__).resolve()), case, f"what={what}",
                 *(f"{k}={json.dumps(v)}" for k, v in options.items())]
        thrifty = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"} if what == "memory" else {}
        done = subprocess.run(words, capture_output=True, text=True, env=os.environ | thrifty)
        if done.returncode: raise RuntimeError(f"{' '.join(words)}\n{done.stderr[-2000:]}")
        found |= json.loads(done.stdout.splitlines()[-1])
    return found


def value(text):
    try: return json.loads(text)
    except ValueError: return text


if __name__ == "__main__":
    if len(sys.argv) < 2 or sys.argv[1] not in CASES:
        sys.exit(__doc__ + "\n" + "\n".join(f"  {n:12} {f.__doc__}" for n, f in CASES.items()))
    options = {"what": "time"} | {k: value(v) for k, v in (w.split("=", 1) for w in sys.argv[2:])}
    print(json.dumps(one(sys.argv[1], **options)))
