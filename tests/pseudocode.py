"""The algorithm boxes of the papers, line by line, in NumPy: the oracles of the trajectory tests.

Never optimised, and no code shared with the library. Letters are the papers'. A model is a list
of p layers; `grad(j, k, W)` is the list of ∇_i f_j(W; ξ_j^k); a compressor or an oracle is a
function of one array. Each method is a generator that yields its iterates, one round at a time.
"""

import math

import numpy as np


# Compressors. --------------------------------------------------------------------------------


def identity(x):
    return x


def top_k(fraction):
    """The max(1, ⌊fraction · size⌋) entries largest in magnitude, ties to the lower position."""

    def compress(x):
        flat = x.ravel()
        k = max(1, math.floor(fraction * flat.size + 1e-9))
        by_size = sorted(range(flat.size), key=lambda i: (-abs(flat[i]), i))
        out = np.zeros_like(flat)
        for i in by_size[:k]:
            out[i] = flat[i]
        return out.reshape(x.shape)

    return compress


def _factors(fraction, x):
    """Of the truncated SVD: orthonormal along the shorter side, the other one carries the size."""
    rank = max(1, math.floor(fraction * min(x.shape) + 1e-9))
    U, s, Vt = np.linalg.svd(x, full_matrices=False)
    left, right = U[:, :rank], Vt[:rank, :].T
    if x.shape[0] <= x.shape[1]:
        return left, right * s[:rank]
    return left * s[:rank], right


def rank_k(fraction, then=identity):
    """The best approximation of rank max(1, ⌊fraction · min(m, n)⌋), its factors compressed."""

    def compress(x):
        if x.ndim < 2:
            return then(x)
        left, right = _factors(fraction, x)
        return then(left) @ then(right).T

    return compress


def natural(x):
    """Every entry to the nearest power of two; halfway goes up in magnitude.

    127 binades are kept, counted down from that of the largest; smaller entries become zero.
    """
    exponents = {}
    for i, value in np.ndenumerate(x):
        if value != 0:
            mantissa, exponent = math.frexp(abs(float(value)))  # value = mantissa · 2^exponent
            exponents[i] = exponent if mantissa >= 0.75 else exponent - 1
    out = np.zeros_like(x)
    for i, exponent in exponents.items():
        if exponent > max(exponents.values()) - 127:
            out[i] = math.copysign(2.0**exponent, x[i])
    return out


def then(first, second):
    """`second` after a sparsifier: it sees the kept values alone, and zeros stay zero."""
    return lambda x: second(first(x))


# Linear minimization oracles over the unit ball. -----------------------------------------------


def lmo_frobenius(G):
    return -G / np.sqrt(np.sum(G * G))


def lmo_rms(G):
    return -G / np.sqrt(np.mean(G * G))


def lmo_sign(G):
    return -np.sign(G)


def lmo_spectral(G):
    """−U Vᵀ of the compact decomposition: a direction of no weight has no part in it."""
    U, s, Vt = np.linalg.svd(G, full_matrices=False)
    rank = np.sum(s > 1e-12 * s[0])
    return -U[:, :rank] @ Vt[:rank, :]


# Paper M. --------------------------------------------------------------------------------------


def algorithm_1(X, M, G_j, grad, *, t, beta, LMO, C_j, C, K):
    """EF21-Muon (simplified): one layer, `X` an array. t: radius of step k, a function of k."""
    n = len(G_j)
    W, M, G_j = X, list(M), list(G_j)
    G = sum(G_j) / n
    for k in range(K):
        X = X + t(k) * LMO(G)  # 3
        S = C(X - W)  # 4
        W = W + S  # 5
        for j in range(n):
            M[j] = (1 - beta) * M[j] + beta * grad(j, k + 1, W)  # 9
            R = C_j(M[j] - G_j[j])  # 10
            G_j[j] = G_j[j] + R  # 11
        G = sum(G_j) / n  # 14
        yield X, W, G


def algorithm_2(X, G_j, grad, *, t, LMO, C_j, C, K):
    """EF21-Muon with deterministic gradients. t, LMO, C_j, C are lists over the p layers."""
    n, p = len(G_j), len(X)
    X, W = list(X), list(X)
    G_j = [list(G) for G in G_j]
    G = [sum(G_j[j][i] for j in range(n)) / n for i in range(p)]
    for k in range(K):
        for i in range(p):
            X[i] = X[i] + t[i](k) * LMO[i](G[i])  # 4
            S = C[i](X[i] - W[i])  # 5
            W[i] = W[i] + S  # 6
        for j in range(n):
            gradient = grad(j, k + 1, W)
            for i in range(p):
                R = C_j[i](gradient[i] - G_j[j][i])  # 12
                G_j[j][i] = G_j[j][i] + R  # 13
        for i in range(p):
            G[i] = sum(G_j[j][i] for j in range(n)) / n  # 18
        yield list(X), list(W), list(G)


def algorithm_3(X, M, G_j, grad, *, t, beta, LMO, C_j, C, K, shrink=lambda k: 0.0, kappa=0.0):
    """EF21-Muon, layer by layer, with momentum.

    Two are not in the box: `shrink`, decoupled weight decay, X ← (1 − shrink) X + t LMO(G), and
    `kappa`, extrapolation: the LMO of G^k + kappa (G^k − G^{k-1}), with G^{-1} = 0.
    """
    n, p = len(G_j), len(X)
    X, W = list(X), list(X)
    M = [list(m) for m in M]
    G_j = [list(G) for G in G_j]
    G = [sum(G_j[j][i] for j in range(n)) / n for i in range(p)]
    before = [np.zeros_like(g) for g in G]
    for k in range(K):
        for i in range(p):  # 3
            ahead = G[i] + kappa * (G[i] - before[i])
            before[i] = G[i]
            X[i] = (1 - shrink(k)) * X[i] + t[i](k) * LMO[i](ahead)  # 4
            S = C[i](X[i] - W[i])  # 5
            W[i] = W[i] + S  # 6
        for j in range(n):  # 9
            gradient = grad(j, k + 1, W)
            for i in range(p):
                M[j][i] = (1 - beta) * M[j][i] + beta * gradient[i]  # 12
                R = C_j[i](M[j][i] - G_j[j][i])  # 13
                G_j[j][i] = G_j[j][i] + R  # 14
        for i in range(p):  # 18
            G[i] = sum(G_j[j][i] for j in range(n)) / n  # 19
        yield list(X), list(W), list(G)


def nesterov(X, grad, *, n, t, decay, LMO, K):
    """LMO steps from Nesterov's momentum, as Muon has it (Jordan 2024), on the mean gradient."""
    X, M = list(X), None
    for k in range(K):
        g = [sum(layer) / n for layer in zip(*(grad(j, k, X) for j in range(n)), strict=True)]
        M = g if M is None else [decay * m + (1 - decay) * a for m, a in zip(M, g, strict=True)]
        for i in range(len(X)):
            X[i] = X[i] + t[i](k) * LMO[i](decay * M[i] + (1 - decay) * g[i])
        yield list(X)


# Paper N. --------------------------------------------------------------------------------------


def normalized_ef21(x, v_i, grad, *, gamma, C, K):
    """Algorithm 1. ‖·‖ is that of the whole model; v_i the vectors v_i^{-1}."""
    n, p = len(v_i), len(x)
    x = list(x)
    v_i = [list(v) for v in v_i]
    for k in range(K + 1):  # 2
        for i in range(n):  # 3
            gradient = grad(i, k, x)  # 4
            for layer in range(p):
                Delta = C[layer](gradient[layer] - v_i[i][layer])  # 5
                v_i[i][layer] = v_i[i][layer] + Delta  # 6
        v = [sum(v_i[i][layer] for i in range(n)) / n for layer in range(p)]  # 8
        norm = math.sqrt(sum(float(np.sum(a * a)) for a in v))
        for layer in range(p):
            x[layer] = x[layer] - gamma(k) * v[layer] / norm  # 9
        yield list(x), list(v)


# Methods they build on. --------------------------------------------------------------------------


def ef21(x, g_i, grad, *, gamma, C, K):
    """Richtárik, Sokolov, Fatkhullin (2021), Algorithm 2. x^{t+1} = x^t − γ g^t."""
    n, p = len(g_i), len(x)
    x = list(x)
    g_i = [list(g) for g in g_i]
    g = [sum(g_i[i][layer] for i in range(n)) / n for layer in range(p)]
    for t in range(K):
        x = [x[layer] - gamma * g[layer] for layer in range(p)]
        for layer in range(p):
            c = [C[layer](grad(i, t + 1, x)[layer] - g_i[i][layer]) for i in range(n)]
            for i in range(n):
                g_i[i][layer] = g_i[i][layer] + c[i]
            g[layer] = g[layer] + sum(c) / n
        yield list(x), list(g)


def ef21_sgdm(x, v_i, g_i, grad, *, gamma, eta, C, K):
    """Fatkhullin, Tyurin, Richtárik (2023), Algorithm 1: EF21 on momenta v_i."""
    n, p = len(g_i), len(x)
    x = list(x)
    v_i = [list(v) for v in v_i]
    g_i = [list(g) for g in g_i]
    g = [sum(g_i[i][layer] for i in range(n)) / n for layer in range(p)]
    for t in range(K):
        x = [x[layer] - gamma * g[layer] for layer in range(p)]
        for layer in range(p):
            change = 0.0
            for i in range(n):
                gradient = grad(i, t + 1, x)[layer]
                v_i[i][layer] = (1 - eta) * v_i[i][layer] + eta * gradient
                c = C[layer](v_i[i][layer] - g_i[i][layer])
                g_i[i][layer] = g_i[i][layer] + c
                change = change + c / n
            g[layer] = g[layer] + change
        yield list(x), list(g)


def ef21_p(x, grad, *, n, gamma, C, K):
    """Gruntkowska, Tyurin, Richtárik (2023), EF21-P: x ← x − γ∇f(w), w ← w + C(x − w)."""
    p = len(x)
    x, w = list(x), list(x)
    for t in range(K):
        gradients = [grad(i, t, w) for i in range(n)]
        for layer in range(p):
            x[layer] = x[layer] - gamma * sum(g[layer] for g in gradients) / n
            w[layer] = w[layer] + C[layer](x[layer] - w[layer])
        yield list(x), list(w)


def ef21_p_with_ef21(x, g_i, grad, *, gamma, C_w, C_s, K):
    """EF21-P for the model and EF21 for the gradients, which are taken at w."""
    n, p = len(g_i), len(x)
    x, w = list(x), list(x)
    g_i = [list(g) for g in g_i]
    for t in range(K):
        g = [sum(g_i[i][layer] for i in range(n)) / n for layer in range(p)]
        for layer in range(p):
            x[layer] = x[layer] - gamma * g[layer]
            w[layer] = w[layer] + C_s[layer](x[layer] - w[layer])
        for i in range(n):
            gradient = grad(i, t + 1, w)
            for layer in range(p):
                g_i[i][layer] = g_i[i][layer] + C_w[layer](gradient[layer] - g_i[i][layer])
        yield list(x), list(w)


def ef14(x, grad, *, n, gamma, C, K):
    """Seide et al. (2014), Stich et al. (2018): what is withheld, e_i, joins the next message.

    gamma: step size of step t, a function of t. It stands inside of the compressor.
    """
    p = len(x)
    x = list(x)
    e_i = [[np.zeros_like(layer) for layer in x] for _ in range(n)]
    for t in range(K):
        gradients = [grad(i, t, x) for i in range(n)]
        for layer in range(p):
            total = 0.0
            for i in range(n):
                target = e_i[i][layer] + gamma(t) * gradients[i][layer]
                sent = C[layer](target)
                e_i[i][layer] = target - sent
                total = total + sent
            x[layer] = x[layer] - total / n
        yield list(x)


def compressed_descent(x, grad, *, n, gamma, C, K):
    """x ← x − γ mean_i C(∇f_i(x)), without feedback."""
    p = len(x)
    x = list(x)
    for t in range(K):
        gradients = [grad(i, t, x) for i in range(n)]
        for layer in range(p):
            x[layer] = x[layer] - gamma * sum(C[layer](g[layer]) for g in gradients) / n
        yield list(x)
