"""The recurrent models by hand: one sentence pair, token by token, in float64, as the papers' equations have it."""

import numpy as np


def softmax(x):
    e = np.exp(x - x.max())
    return e / e.sum()


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def dot(query, keys, params):
    return np.array([query @ key for key in keys])


def general(query, keys, params):
    return np.array([query @ (key @ params["memory_kernel"]) for key in keys])


def additive(query, keys, params):
    hidden = [np.tanh(query @ params["query_kernel"] + key @ params["memory_kernel"]) for key in keys]
    return np.array([params["scale"] @ each for each in hidden])


SCORES = {"dot": dot, "general": general, "additive": additive}


def attend(score, query, memory, params):
    """The context vector (Luong et al. 2015, equations 7 and 8; Bahdanau et al. 2015, equations 5 and 6)."""
    weights = softmax(SCORES[score](query, memory, params))
    return sum(weight * each for weight, each in zip(weights, memory, strict=True))


def cell(params, x, state):
    """One step of an LSTM: (hidden, cell)."""
    into, forget, new, out = (
        x @ params["input_kernel"][:, gate] + state[0] @ params["recurrent_kernel"][:, gate] + params["bias"][gate]
        for gate in range(4)
    )
    memory = sigmoid(forget) * state[1] + sigmoid(into) * np.tanh(new)
    return sigmoid(out) * np.tanh(memory), memory


def read(params, inputs, state=None, backward=False):
    """(hidden states in the order of the inputs, last state)."""
    width, found = params["bias"].shape[1], []
    state = state or (np.zeros(width), np.zeros(width))
    for x in reversed(inputs) if backward else inputs:
        state = cell(params, x, state)
        found.append(state[0])
    return found[::-1] if backward else found, state


def encode(params, directions, num_layers, x):
    """(memory, last state of each layer) of the encoder of LSTMSeq2Seq and LSTMAttention."""
    finals = []
    for number in range(num_layers):
        read_both = [read(params[f"layers_{number}_{d}"], x, backward=d == "backward") for d in directions]
        x = [np.concatenate(parts) for parts in zip(*(hidden for hidden, _ in read_both), strict=True)]
        finals.append(tuple(np.concatenate(parts) for parts in zip(*(state for _, state in read_both), strict=True)))
    return x, finals


def lstm_seq2seq(config, params, source, target, tables):
    directions = {"both": ("forward", "backward")}.get(config.reading, (config.reading,))
    _, states = encode(params["encoder"], directions, config.num_layers, list(tables["source"][source]))
    x = list(tables["target"][target])
    for number, state in enumerate(states):
        x, _ = read(params[f"decoder_{number}"], x, state)
    return np.array(x) @ tables["output"].T


def lstm_attention(config, params, source, target, tables):
    directions = {"both": ("forward", "backward")}.get(config.reading, (config.reading,))
    memory, states = encode(params["encoder"], directions, config.num_layers, list(tables["source"][source]))
    decoder, mixed, found = params["decoder"], np.zeros(config.width), []
    for token in target:
        x = tables["target"][token]
        if config.input_feeding:
            x = np.concatenate([x, mixed])
        for number in range(config.num_layers):
            states[number] = cell(decoder[f"layers_{number}"], x, states[number])
            x = states[number][0]
        context = attend(config.score, x, memory, decoder.get("attention"))
        mixed = np.tanh(np.concatenate([context, x]) @ decoder["mixer_kernel"])
        found.append(mixed @ tables["output"].T)
    return np.array(found)


def gnmt(config, params, source, target, tables):
    x, encoder = list(tables["source"][source]), params["encoder"]
    both = [read(encoder["bottom"][f"layers_0_{d}"], x, backward=d == "backward")[0] for d in ("forward", "backward")]
    x, _ = read(encoder["layers_1"], [np.concatenate(pair) for pair in zip(*both, strict=True)])
    for number in range(2, config.num_layers):
        above, _ = read(encoder[f"layers_{number}"], x)
        x = [new + old for new, old in zip(above, x, strict=True)]
    memory, zero, found = x, np.zeros(config.width), []
    states = [(zero, zero)] * config.num_layers
    for token in target:
        context = attend("additive", states[0][0], memory, params["bottom"]["attention"])
        x = tables["target"][token]
        for number in range(config.num_layers):
            layer = params["bottom"]["lstm"] if number == 0 else params[f"decoder_{number - 1}"]
            states[number] = cell(layer, np.concatenate([x, context]), states[number])
            x = states[number][0] + (x if number >= 2 else 0)
        found.append(x @ tables["output"].T)
    return np.array(found)
