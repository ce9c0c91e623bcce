"""The optimizers' papers in numpy, float64, on one layer's parameter as a matrix or a vector: references for the tests.

Each takes the parameter, its gradient, the number of the step from 1, what it keeps from step to step, whether it is no
bias or norm, and whether it is a matrix of a hidden layer; it returns what to subtract, times the learning rate.
"""

import math

import numpy as np

DECAY = 0.05
"""Weight decay of all of them."""


def adam(m, v, g, t, beta1=0.9, beta2=0.999, epsilon=1e-8):
    m[:] = beta1 * m + (1 - beta1) * g
    v[:] = beta2 * v + (1 - beta2) * g**2
    return (m / (1 - beta1**t)) / (np.sqrt(v / (1 - beta2**t)) + epsilon)


def adamw_update(w, g, t, memory, decays, hidden):
    return adam(memory["m"], memory["v"], g, t) + DECAY * decays * w


def lamb_update(w, g, t, memory, decays, hidden):
    update = adam(memory["m"], memory["v"], g, t, epsilon=1e-6) + DECAY * decays * w
    return update * np.linalg.norm(w) / np.linalg.norm(update) if decays else update


def lion_update(w, g, t, memory, decays, hidden):
    m = memory["m"]
    update = np.sign(0.9 * m + 0.1 * g)
    m[:] = 0.99 * m + 0.01 * g
    return update + DECAY * decays * w


def adafactor_update(w, g, t, memory, decays, hidden):
    decay = 1 - t**-0.8
    if decays and min(w.shape) >= 5:
        memory["r"] = decay * memory.get("r", 0) + (1 - decay) * (g**2).sum(1)
        memory["c"] = decay * memory.get("c", 0) + (1 - decay) * (g**2).sum(0)
        second = np.outer(memory["r"], memory["c"]) / memory["r"].sum()
    else:
        second = memory["v"] = decay * memory["v"] + (1 - decay) * g**2
    update = g / np.sqrt(second)
    update = update / max(1.0, np.sqrt((update**2).mean()))
    return update * max(1e-3, np.sqrt((w**2).mean())) + DECAY * decays * w


def muon_update(w, g, t, memory, decays, hidden):
    if not hidden:
        return adamw_update(w, g, t, memory, decays, hidden)
    m = memory["m"]
    m[:] = 0.95 * m + 0.05 * g
    x = 0.95 * m / (1 - 0.95 ** (t + 1)) + 0.05 * g / (1 - 0.95**t)
    x = x / np.linalg.norm(x)
    for _ in range(5):
        a = x @ x.T
        x = 3.4445 * x - 4.7750 * a @ x + 2.0315 * a @ a @ x
    return 0.2 * math.sqrt(max(w.shape)) * x + DECAY * w


def sgd_update(w, g, t, memory, decays, hidden):
    return g + DECAY * decays * w


UPDATES = {
    "adamw": adamw_update,
    "lamb": lamb_update,
    "adafactor": adafactor_update,
    "lion": lion_update,
    "muon": muon_update,
    "sgd": sgd_update,
}
