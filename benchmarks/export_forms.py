"""The forms of an exported policy: its weights for exported.py, and the same few operations as ONNX."""

import importlib
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
import torch.nn as nn
from torch import Tensor

try:
    import onnx
    import onnxruntime
    from onnx import helper, numpy_helper

    FLOAT = onnx.TensorProto.FLOAT
except ImportError:  # of requirements-tools.txt
    onnx = None

from benchmarks.export_alarm import Alarm
from common import InputError

ONNX_NAMES = {"ReLU": "Relu", "LeakyReLU": "LeakyRelu", "Tanh": "Tanh"}
CRITICS = {"EasyBCQ": 2, "BestOfCandidates": 1}  # by class: how many of the twins rank the candidates


class Policy:
    """The module that acts, between the units of its environment."""

    def __init__(self, saved: dict):
        script = importlib.import_module(f"algos.{json.loads(saved['config'])['algo']}")
        self.actor, self.kind, self.units = getattr(script, saved["class"])(**saved["sizes"]), saved["class"], saved
        self.actor.load_state_dict(saved["actor"])

    def networks_see(self, obs: np.ndarray) -> Tensor:
        shift, scale = self.units["obs_shift"], self.units["obs_scale"]
        return ((torch.from_numpy(obs) - shift) / scale).float()

    def unit_action(self, action: np.ndarray) -> Tensor:
        low, high = self.units["action_low"], self.units["action_high"]
        return ((torch.from_numpy(action) - (high + low) / 2) / torch.where(high > low, (high - low) / 2, 1.0)).float()


# --- NumPy: the weights that exported.py acts with ---
def layers(name: str, net: nn.Sequential) -> dict:
    linear = [layer for layer in net if hasattr(layer, "weight")]
    p = {f"{name}_layers": len(linear), f"{name}_activation": type(net[1]).__name__}
    for i, layer in enumerate(linear):
        p[f"{name}_weight{i}"] = layer.weight.T if isinstance(layer, nn.Linear) else layer.weight
        p[f"{name}_bias{i}"] = layer.bias
    return p


def as_numpy(p: dict) -> dict:
    return {name: x.detach().numpy() if isinstance(x, Tensor) else np.asarray(x) for name, x in p.items()}


def policy_arrays(policy: Policy) -> dict:
    """Raises InputError where the policy is of no form that exported.py knows."""
    whole, ranks = policy.actor, policy.kind in CRITICS
    actor = getattr(whole, "behaviour", getattr(whole, "actor", whole))
    if hasattr(whole, "critic") != ranks or not hasattr(actor, "net"):
        known = "an actor.net, and of these two classes a critic: EasyBCQ, BestOfCandidates"
        raise InputError(
            f"a policy of the class {policy.kind} is not exported: benchmarks/export_forms.py knows {known}"
        )
    p = {name: policy.units[name] for name in ("action_low", "action_high", "obs_shift", "obs_scale")}
    obs_dim, action_dim = len(p["obs_shift"]), len(p["action_low"])
    p["obs_mean"] = getattr(actor, "obs_mean", torch.zeros(obs_dim))
    p |= {"obs_std": getattr(actor, "obs_std", torch.ones(obs_dim)), **layers("actor", actor.net)}
    # a Gaussian with the same deviation everywhere is not squashed, unless its mean is
    p["squashed"] = isinstance(actor.net[-1], nn.Tanh) or not hasattr(actor, "log_std")
    if hasattr(actor, "noise_dim"):  # noise beside the observation is, times the first weights, a bias
        noise, weight = whole.noise[:, None] if ranks else torch.zeros(actor.noise_dim), p["actor_weight0"]
        p["actor_bias0"] = p["actor_bias0"] + noise.clamp(-3, 3) @ weight[obs_dim:]
        p["actor_weight0"] = weight[:obs_dim]
    elif ranks:
        p["noise"] = whole.noise
    else:  # without the deviation
        last = p["actor_layers"] - 1
        p |= {f"actor_{x}{last}": p[f"actor_{x}{last}"][..., :action_dim] for x in ("weight", "bias")}
    if ranks:
        critic = layers("critic", whole.critic.net)
        p |= {name: x[: CRITICS[policy.kind]] if isinstance(x, Tensor) else x for name, x in critic.items()}
    return as_numpy(p)


def alarm_arrays(alarm: Alarm) -> dict:
    """The members' means of what changes."""
    dynamics, p = alarm.dynamics, {"ensemble_activation": "SiLU", "ensemble_layers": len(alarm.dynamics.layers)}
    for i, layer in enumerate(dynamics.layers):
        columns = alarm.moves if i == len(dynamics.layers) - 1 else slice(None)
        p |= {f"ensemble_{x}{i}": getattr(layer, x)[..., columns] for x in ("weight", "bias")}
    p |= {"input_mean": dynamics.input_mean, "input_std": dynamics.input_std}
    return as_numpy(p | {"threshold": np.float32(alarm.threshold)})


# --- ONNX: exported.py, operation by operation ---
class Graph:
    def __init__(self):
        self.nodes, self.weights = [], []

    def op(self, kind: str, *inputs: str | np.ndarray, name: str = "", **attributes) -> str:
        """Adds a node. Inputs are names, or numbers that the file keeps. Returns the name of the output."""
        names = []
        for x in inputs:
            if not isinstance(x, str):
                self.weights.append(numpy_helper.from_array(np.asarray(x), f"weight{len(self.weights)}"))
                x = self.weights[-1].name
            names.append(x)
        name = name or f"{kind}{len(self.nodes)}"
        self.nodes.append(helper.make_node(kind, names, [name], **attributes))
        return name

    def network(self, p: dict, name: str, x: str) -> str:
        kind = str(p[f"{name}_activation"])
        for i in range(p[f"{name}_layers"]):
            if i:
                x = self.op("Mul", x, self.op("Sigmoid", x)) if kind == "SiLU" else self.op(ONNX_NAMES[kind], x)
            x = self.op("Add", self.op("MatMul", x, p[f"{name}_weight{i}"]), p[f"{name}_bias{i}"])
        return x

    def networks_see(self, p: dict) -> str:
        return self.op("Cast", self.op("Div", self.op("Sub", "obs", p["obs_shift"]), p["obs_scale"]), to=FLOAT)

    def write(self, file: Path, inputs: dict[str, np.ndarray], outputs: dict[str, np.ndarray]) -> Callable:
        """For batches of any size; inputs and outputs are described by a row each. Returns onnxruntime's function."""
        ports = [
            [
                helper.make_tensor_value_info(k, helper.np_dtype_to_tensor_dtype(x.dtype), ["batch", *x.shape])
                for k, x in rows.items()
            ]
            for rows in (inputs, outputs)
        ]
        graph = helper.make_graph(self.nodes, file.stem, *ports, self.weights)
        model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)
        onnx.checker.check_model(model, full_check=True)
        onnx.save(model, file)
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = options.inter_op_num_threads = 1
        session = onnxruntime.InferenceSession(str(file), options, providers=["CPUExecutionProvider"])
        return lambda *rows: session.run(None, dict(zip(inputs, rows)))


def policy_onnx(file: Path, p: dict) -> Callable:
    graph, box = Graph(), p["action_low"]
    op, action_dim = graph.op, len(box)
    x = graph.networks_see(p)
    out = graph.network(p, "actor", op("Div", op("Sub", x, p["obs_mean"]), p["obs_std"]))
    if "noise" in p:
        mean, log_std = (op("Gather", out, i, axis=-1) for i in np.split(np.arange(2 * action_dim), 2))
        std = op("Exp", op("Clip", log_std, np.float32(-5), np.float32(2)))
        out = op("Add", mean, op("Mul", std, p["noise"]))
    action = op("Tanh", out) if p["squashed"] else op("Clip", out, np.float32(-1), np.float32(1))
    if "critic_layers" in p:
        shape = op("Concat", op("Shape", action, end=2), np.array([len(p["obs_shift"])]), axis=0)
        pairs = op("Concat", op("Expand", x, shape), action, axis=-1)
        q = op(
            "ReduceMin", graph.network(p, "critic", op("Unsqueeze", pairs, np.array([1]))), np.array([1]), keepdims=0
        )
        best = op("Expand", op("ArgMax", q, axis=0), np.array([1, 1, action_dim]))  # (1, batch, action_dim)
        action = op("Squeeze", op("GatherElements", action, best, axis=0), np.array([0]))
    action = op("Cast", action, to=helper.np_dtype_to_tensor_dtype(box.dtype))
    op("Add", (p["action_high"] + box) / 2, op("Mul", (p["action_high"] - box) / 2, action), name="action")
    return graph.write(file, {"obs": p["obs_shift"]}, {"action": box})


def alarm_onnx(file: Path, p: dict) -> Callable:
    graph, box = Graph(), p["action_low"]
    op, center, half = graph.op, (p["action_high"] + box) / 2, (p["action_high"] - box) / 2
    unit = op("Cast", op("Div", op("Sub", "action", center), np.where(half > 0, half, np.ones_like(half))), to=FLOAT)
    x = op("Concat", graph.networks_see(p), unit, axis=-1)
    change = graph.network(p, "ensemble", op("Div", op("Sub", x, p["input_mean"]), p["input_std"]))
    off = op("Sub", change, op("ReduceMean", change, np.array([0])))
    variance = op("ReduceMean", op("Mul", off, off), np.array([0, 2]), keepdims=0)
    u = op("Sqrt", variance, name="disagreement")
    op("Not", op("LessOrEqual", u, p["threshold"]), name="alarm")
    outputs = {"disagreement": np.empty((), np.float32), "alarm": np.empty((), bool)}
    return graph.write(file, {"obs": p["obs_shift"], "action": box}, outputs)
