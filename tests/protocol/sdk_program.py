"""The other side of `test_sdk_interop`: runs in an environment with avp 0.6.2, and uses nothing but its public names.

Takes one JSON command per line, answers with one JSON line. Tensors pass in safetensors files.
"""

from __future__ import annotations

import itertools
import json
import sys
from pathlib import Path
from typing import Any

import avp  # pyright: ignore[reportMissingImports]
import torch
from avp.connectors.huggingface import HuggingFaceConnector  # pyright: ignore[reportMissingImports]
from safetensors.torch import load_file, save_file

connector: Any = None


def load(path: str) -> dict[str, Any]:
    global connector
    connector = HuggingFaceConnector.from_pretrained(path, device="cpu", dtype=torch.float32)
    identity = avp.extract_model_identity(connector.model, connector.tokenizer)
    hello = avp.HelloMessage(agent_id="researcher", identity=identity)
    return {"hello": json.loads(hello.to_json()) if hasattr(hello, "to_json") else hello.to_dict()}


def think(prompt: str, steps: int, message: str, tensors: str) -> dict[str, Any]:
    """Think, and write the context as a message and as tensors."""
    context = connector.think(prompt, steps=steps)
    Path(message).write_bytes(context.to_bytes(session_id="s1", source_agent_id="researcher"))
    _save(context, tensors)
    messages = [{"role": "user", "content": prompt}]
    encoded = connector.tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=True)
    return {"ids": encoded["input_ids"], "positions": context.seq_len}


def decode_on(message: str, ids: list[int], tokens: int, tensors: str) -> dict[str, Any]:
    """Read a context from a message, feed `ids` on top of it and decode greedily."""
    context = avp.AVPContext.from_bytes(Path(message).read_bytes())
    _save(context, tensors)
    decoded: list[int] = []
    cache, feed = context.past_key_values, torch.tensor([ids])
    with torch.inference_mode():
        for _ in range(tokens):
            output = connector.model(input_ids=feed, past_key_values=cache, use_cache=True)
            cache = output.past_key_values
            decoded.append(int(output.logits[0, -1].argmax()))
            feed = torch.tensor([decoded[-1:]])
    return {"tokens": decoded, "steps": context.num_steps, "family": context.model_family}


def write_messages(folder: str) -> dict[str, Any]:
    """Messages of every dtype and compression, and what they hold."""
    generator = torch.Generator().manual_seed(3)
    tensors, names = {}, []
    levels = {level.name.lower(): level for level in avp.CompressionLevel}
    for dtype, (level, compression) in itertools.product(("float32", "float16", "bfloat16"), levels.items()):
        name = f"{dtype}-{level}"
        states = torch.randn(2, 16, generator=generator).to(getattr(torch, dtype))
        metadata = avp.AVPMetadata(
            hidden_dim=16, payload_type=avp.PayloadType.HIDDEN_STATE, dtype=avp.DataType[dtype.upper()],
            tensor_shape=(2, 16), extra={"note": "é"}, avp_map_id="vocab:00" if level == "none" else "",
        )  # fmt: skip
        data = avp.encode(states.contiguous().view(torch.uint8).numpy().tobytes(), metadata, compression)
        (Path(folder) / f"{name}.hidden").write_bytes(data)
        tensors[name] = states
        names.append(name)
    save_file(tensors, str(Path(folder) / "hidden.safetensors"))
    return {"names": names}


def read_hidden(message: str, tensors: str) -> dict[str, Any]:
    """Read hidden states that the other side wrote, and compare them bit for bit."""
    found = avp.decode(Path(message).read_bytes())
    (expected,) = load_file(tensors).values()
    same = bytes(found.payload) == expected.contiguous().view(torch.uint8).numpy().tobytes()
    shape = list(found.metadata.tensor_shape)
    return {"same": same, "shape": shape, "dtype": found.metadata.dtype.name.lower(), "map": found.metadata.avp_map_id}


def read_kv(message: str, tensors: str) -> dict[str, Any]:
    """Read a KV-cache that the other side wrote, and hand its tensors back."""
    context = avp.AVPContext.from_bytes(Path(message).read_bytes())
    _save(context, tensors)
    return {"positions": context.seq_len, "layers": context.num_layers}


def _save(context: Any, tensors: str) -> None:
    layers = context.past_key_values.layers
    named = {f"{i}.{kind}": getattr(layer, kind)[0].contiguous() for i, layer in enumerate(layers)
             for kind in ("keys", "values")}  # fmt: skip
    save_file(named, tensors)


COMMANDS = {function.__name__: function for function in (load, think, decode_on, write_messages, read_hidden, read_kv)}

if __name__ == "__main__":
    torch.set_num_threads(1)
    answers, sys.stdout = sys.stdout, sys.stderr
    for line in sys.stdin:
        name, arguments = json.loads(line)
        print(json.dumps(COMMANDS[name](**arguments)), file=answers, flush=True)
