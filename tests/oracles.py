"Slow and plain: what the library computes, as loops over rows in float64."
import math

import torch


def mip_loop(vectors):
    "Multilinear inner product of M vectors, one coordinate at a time."
    total = 0.
    for coordinates in zip(*(v.tolist() for v in vectors)): total += math.prod(coordinates)
    return total


def mip_scores_loop(embeddings, target):
    "All pairs, one at a time."
    queries = [e for m, e in enumerate(embeddings) if m != target]
    return torch.tensor([[mip_loop([*(q[i] for q in queries), c]) for c in embeddings[target]]
                         for i in range(len(queries[0]))],
                        dtype=torch.float64)


def info_nce_loop(scores, scale, rows=None):
    "Mean over the rows of minus the log of the softmax's diagonal; `rows` may ask and answer."
    rows = list(range(len(scores))) if rows is None else rows
    losses = []
    for i in rows:
        exponentials = [math.exp(scale * float(scores[i][j])) for j in rows]
        losses.append(-math.log(math.exp(scale * float(scores[i][i])) / sum(exponentials)))
    return sum(losses) / len(losses)


def unit(v): return v / v.norm()


def gated_score(gate, embeddings, target, i, j, present=None):
    "The gate for one query and one candidate, from the gate's parameters alone."
    c, queries = embeddings[target][j], [m for m in range(len(embeddings)) if m != target]
    here = [present is None or bool(present[i, m]) for m in queries]
    T, alpha, has_null = gate.temperature(), gate.strength(), gate.fit.null_bias is not None
    if hasattr(gate.fit, "table"):
        fits = [gate.fit.table[target, m] / T for m in queries]
        null = gate.fit.null_bias[target] / T if has_null else None
    else:
        asked = unit(gate.fit.query[target] @ c)
        fits = [asked @ unit(gate.fit.key[m] @ torch.where(torch.tensor(ok), embeddings[m][i], 1.)) / T
                for m, ok in zip(queries, here)]
        null = (gate.fit.null_head(c[None])[0, 0] + gate.fit.null_bias[target]) / T if has_null else None
    if gate.weighting == "softmax":
        total = sum(f.exp() for f, ok in zip(fits, here) if ok) + (null.exp() if has_null else 0)
        weights = [f.exp() / total for f in fits]
    else:
        weights = [f.sigmoid() * (1 - null.sigmoid() if has_null else 1) for f in fits]
    product = c
    for m, w, ok in zip(queries, weights, here):
        closing, n, e = alpha * (1 - w), gate.neutral.directions[m], embeddings[m][i]
        if not ok: g = torch.full_like(n, len(n)**-0.5) if gate.neutral.kind == "none" else unit(n)
        elif gate.neutral.kind == "none": g = (1 - closing) * e
        else:
            g = (1 - closing) * e + closing * unit(n)
            if gate.renormalise: g = unit(g)
        product = product * g
    return product.sum() * len(c)**((len(embeddings) - 1) / 2)


def gram_matrix(vectors):
    "All inner products of a few vectors, one at a time."
    return torch.tensor([[mip_loop([v, w]) for w in vectors] for v in vectors], dtype=torch.float64)


def volume_score(vectors):
    "Minus the volume that a few vectors enclose, by a determinant."
    return -math.sqrt(max(torch.linalg.det(gram_matrix(vectors)).item(), 0.))


def triangle_score(a, b, c):
    "Minus half of |u|^2 |v|^2 - <u, v>^2 for the sides u, v that start at c, one coordinate at a time."
    u, v = ([p - q for p, q in zip(corner.tolist(), c.tolist())] for corner in (a, b))
    inner = lambda x, y: math.fsum(p*q for p, q in zip(x, y))
    return -(inner(u, u)*inner(v, v) - inner(u, v)**2) / 2


def scores_loop(embeddings, target, present, of_row):
    "`of_row(queries, candidate)` for all pairs, one at a time; queries that are missing are left out of the list."
    queries = [m for m in range(len(embeddings)) if m != target]
    rows = range(len(embeddings[queries[0]]))
    here = lambda i: [embeddings[m][i] for m in queries if present is None or present[i, m]]
    return [[of_row(here(i), c) for c in embeddings[target]] for i in rows]


def both_ways_loop(scores, scale, present):
    "InfoNCE among the columns and among the rows, over the targets that two rows have; `scores[t]` as nested lists."
    losses = []
    for t, table in enumerate(scores):
        rows = [i for i in range(len(table)) if present is None or present[i, t]]
        if len(rows) > 1: losses += [info_nce_loop(table, scale, rows), info_nce_loop([*zip(*table)], scale, rows)]
    return sum(losses) / len(losses)


def diversity(embeddings, target, i, present=None):
    "One minus the mean cosine of all pairs of query modalities of row i."
    here = [m for m in range(len(embeddings)) if m != target and (present is None or present[i, m])]
    cosines = [embeddings[a][i] @ embeddings[b][i] for a in here for b in here if a < b]
    return 1 - sum(cosines)/len(cosines) if cosines else 1.


def subset_logits(embeddings, target, i, j, scale, penalty, null=-math.inf, max_subset=None, present=None,
                  by_diversity=False):
    "For one query and one candidate: subset of modalities, a sorted tuple -> logit, through all binary numbers."
    c, queries = embeddings[target][j], [m for m in range(len(embeddings)) if m != target]
    logits = {(): torch.tensor(null, dtype=c.dtype)}
    if by_diversity: scale = scale * diversity(embeddings, target, i, present)
    for bits in range(1, 2**len(queries)):
        subset = tuple(m for k, m in enumerate(queries) if bits >> k & 1)
        if len(subset) > (max_subset or len(queries)) or present is not None and not all(present[i, m] for m in subset):
            continue
        product = math.prod([embeddings[m][i] for m in subset], start=c).sum()
        logits[subset] = scale * len(c)**(len(subset)/2) * product - penalty * (len(subset) - 1)
    return logits


def subset_score(*args, **options):
    "Logarithm of the summed odds of all subsets."
    return sum(logit.exp() for logit in subset_logits(*args, **options).values()).log()


def nt_xent_loop(a, b, temperature, rows=None):
    "Minus the log of what each of the 2N rows gives its partner, among all others but itself, in the mean."
    rows = list(range(len(a))) if rows is None else rows
    views = [(i, k, unit(x[i])) for k, x in enumerate((a, b)) for i in rows]
    losses = []
    for i, k, v in views:
        others = [((v @ w) / temperature, j) for j, l, w in views if (j, l) != (i, k)]
        partner = next(score for score, j in others if j == i)
        losses.append(torch.stack([score for score, _ in others]).exp().sum().log() - partner)
    return sum(losses) / len(losses)


def fused_row(fusion, tokens):
    "What CLS becomes beside these tokens of one row, modality -> vector, by PyTorch's own layers, with no mask."
    x = torch.stack([fusion.cls[0], *(e + fusion.modality[m] for m, e in tokens.items())])[None]
    for layer in fusion.blocks: x = layer(x)
    return fusion.norm(x[0, 0])


def fused_loop(fusion, embeddings, subset, present=None):
    "The fusion of each row, one at a time, from what it has of the subset."
    has = lambda i, m: present is None or bool(present[i, m])
    return torch.stack([fused_row(fusion, {m: embeddings[m][i] for m in subset if has(i, m)})
                        for i in range(len(embeddings[subset[0]]))])


def head_row(head, x):
    "Three linear layers, LayerNorm and ReLU between, for one vector; of length 1."
    a, b, c = head.linears
    return unit(c(head.norms[1](b(head.norms[0](a(x)).relu())).relu()))


def comm_loop(objective, one, two, present=None, fused=1., single=1., retrieval=0.):
    "CoMM from the fusion of one row and one set of modalities at a time."
    M, B = len(one), len(one[0])
    def z(copy, subset): return torch.stack([head_row(objective.head, v) for v in
                                             fused_loop(objective.fusion, copy, subset, present)])
    def both_ways(s, t, rows):
        return (nt_xent_loop(z(one, s), z(two, t), objective.temperature, rows)
                + nt_xent_loop(z(two, s), z(one, t), objective.temperature, rows)) / 2
    everything, total, weight = tuple(range(M)), 0., 0.
    terms = [(fused, everything, everything, None), *((single, (m,), everything, m) for m in range(M))]
    terms += [(retrieval, tuple(k for k in range(M) if k != m), (m,), m) for m in range(M)]
    for w, s, t, needed in terms:
        rows = [i for i in range(B) if present is None or needed is None or present[i, needed]]
        if w == 0 or len(rows) < 2: continue
        total, weight = total + w * both_ways(s, t, rows), weight + w
    return total / weight


def cross_self_loop(objective, one, two, present=None):
    "CLIP both ways on every pair, in the mean of both copies, and SimCLR within each modality."
    M, B, T = len(one), len(one[0]), objective.temperature
    has = lambda i, *ms: present is None or all(present[i, m] for m in ms)
    z = [[torch.stack([head_row(objective.head[m], x) for x in copy[m]]) for m in range(M)] for copy in (one, two)]
    def ask(a, b, rows):
        found = [torch.stack([a[i] @ b[j] / T for j in rows]).logsumexp(0) - a[i] @ b[i] / T for i in rows]
        return sum(found) / len(rows)
    cross, own = [], []
    for m in range(M):
        rows = [i for i in range(B) if has(i, m)]
        if len(rows) > 1: own.append(nt_xent_loop(z[0][m], z[1][m], T, rows))
        for k in range(m):
            rows = [i for i in range(B) if has(i, m, k)]
            if len(rows) > 1: cross += [ask(c[a], c[b], rows) for c in z for a, b in ((m, k), (k, m))]
    return sum(cross)/len(cross) + objective.own * sum(own)/len(own)
