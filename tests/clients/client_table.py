"""The clients, in the order of the page. To add one: its file, and a line here."""

from __future__ import annotations

from importlib import import_module

from tests.clients.cells import Client

MODULES = (
    "torch_clients.transformers_client",
    "torch_clients.lm_eval_client",
    "torch_clients.peft_client",
    "torch_clients.bitsandbytes_client",
    "torch_clients.torchao_client",
    "torch_clients.quanto_client",
    "onnx_clients.onnxruntime_client",
    "onnx_clients.npm_client",
    "onnx_clients.genai_client",
    "onnx_clients.openvino_client",
    "other_clients.ctranslate2_client",
    "other_clients.mlx_client",
    "other_clients.llama_cpp_client",
    "other_clients.vllm_client",
    "other_clients.sglang_client",
)


def clients() -> dict[str, tuple[Client, str, int]]:
    """By name: the client, its module, and its number there."""
    found = {}
    for name in MODULES:
        module = import_module(f"tests.clients.{name}")
        several: tuple[Client, ...] = getattr(module, "CLIENTS", None) or (module.CLIENT,)
        for number, client in enumerate(several):
            found[client.name] = client, module.__name__, number
    return found
