"""``avp-agents bench frames``: what it costs to turn a KV-cache into a frame and back, against memcpy and a peer.

All variants take turns in one run and work on the same KV-cache, in memory that is there already, so that neither side
pays for fresh pages. The peer is the reference SDK in an environment of its own.
"""

from __future__ import annotations

import json
import subprocess
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
import xxhash

from avp_agents.context import Context, TokenSegment
from avp_agents.errors import ConfigurationError
from avp_agents.kv_cache import HostKv
from avp_agents.protocol import FrameReader, decode_context, encode_context, open_frame, read_frame
from avp_agents.protocol.frame_mac import tail_mac
from avp_agents.protocol.tensor_bytes import empty_buffer
from avp_bench.engine_bench import Figure
from avp_bench.timing import medians

LAYERS, KV_HEADS, HEAD_DIM = 24, 8, 128
_KEY = b"a key for measuring with, no secret"
_MIB = 1 << 20


def kv_context(megabytes: int) -> Context:
    """A context of tokens with a bfloat16 KV-cache of about that many MiB, of the shape of an 1.5B model."""
    positions = max(1, megabytes * _MIB // (LAYERS * 2 * KV_HEADS * HEAD_DIM * 2))
    random = torch.Generator().manual_seed(0)

    def tensor() -> torch.Tensor:
        return torch.randn(KV_HEADS, positions, HEAD_DIM, generator=random).bfloat16()

    context = Context("00" * 32, "bfloat16", (TokenSegment((0,) * positions),))
    context.attach(kv=HostKv(tuple((tensor(), tensor()) for _ in range(LAYERS))))
    return context


def measure(
    megabytes: int, repeats: int, sdk_python: Path | None, report: Callable[[str], None] = lambda _: None
) -> list[Figure]:
    """All figures.

    Args:
        megabytes: Size of the KV-cache.
        repeats: Timed rounds.
        sdk_python: Interpreter of an environment with the reference SDK; None leaves that comparison out.
        report: Told what is being measured.

    Raises:
        ConfigurationError: The SDK does not run in `sdk_python`.
    """
    report("Timing frames")
    context = kv_context(megabytes)
    figures = _speed(context, repeats)
    report("Measuring memory")
    figures += _memory(context)
    report("Timing storage forms")
    figures += _storage(context, repeats)
    if sdk_python is not None:
        report("Timing the reference SDK")
        ours = next(f.value for f in figures if f.name == "assembled in new memory + decoded")
        figures += _against_sdk(context, sdk_python, repeats, ours or 0.0)
    return figures


def _speed(context: Context, repeats: int) -> list[Figure]:
    """Encoding and decoding against copying the same bytes, and what checksums and MAC take of it."""
    size = _kv(context).nbytes
    source, target = np.ones(size, dtype=np.uint8), np.ones(size, dtype=np.uint8)
    buffer = empty_buffer(encode_context(context, key=_KEY).nbytes)
    buffer[:] = bytes(len(buffer))
    variants: dict[str, Callable[[], None]] = {"memcpy": lambda: np.copyto(target, source)}
    for name, authenticate in (("", False), (" with the MAC over keys and values", True)):
        variants["encoded" + name] = lambda on=authenticate: _encode(context, on).copy_into(buffer)
        variants["decoded" + name] = lambda: _decode(buffer)
    variants["chunks handed out, not copied"] = lambda: _drain(context)
    variants["checksums alone, one pass"] = lambda: _update_each(source, xxhash.xxh3_128)
    variants["MAC alone, one pass"] = lambda: _update_each(source, lambda: tail_mac(_KEY))
    variants["assembled in new memory + decoded"] = lambda: _decode(_encode(context, False).assemble())
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "context.avp"
        variants["written to a file + mapped"] = lambda: _through_file(context, path)
        seconds = medians(variants, repeats)
    plain = seconds["encoded"] + seconds["decoded"]
    zero_copy = seconds["chunks handed out, not copied"] + seconds["decoded"]
    group = f"{size / _MIB:.0f} MiB bfloat16"
    return [
        *(Figure(group, name, 1000 * value, "ms", f"{size / value / 1e9:.1f} GB/s") for name, value in seconds.items()),
        Figure(group, "encoded + decoded against memcpy", seconds["memcpy"] / plain, "x", "1 = as fast as one copy"),
        Figure(group, "chunks + decoded against memcpy", seconds["memcpy"] / zero_copy, "x", "1 = as fast as one copy"),
    ]


def _memory(context: Context) -> list[Figure]:
    """The most memory that a hand-over takes beside the KV-cache itself."""
    size = _kv(context).nbytes
    figures = []
    for name, work in {
        "assembled + decoded": lambda: _decode(_encode(context, True).assemble()),
        "streamed into a reader + decoded": lambda: _stream(context),
    }.items():
        peak = _peak_extra(work)
        value = None if peak is None else peak / size
        figures.append(Figure("peak extra memory", name, value, "x", "of the KV-cache" if peak else "needs Linux"))
    return figures


def _storage(context: Context, repeats: int) -> list[Figure]:
    """The other ways to store keys and values: bytes, times, and what int8 changes."""
    size = _kv(context).nbytes
    figures = []
    for name, options in {"zstd": {"compress": True}, "int8": {"int8": True}}.items():
        frame = encode_context(context, key=_KEY, authenticate_kv=False, **options)
        stored = bytearray(frame.nbytes)
        frame.copy_into(stored)

        def encode(options: dict[str, Any] = options, stored: bytearray = stored) -> None:
            encode_context(context, key=_KEY, authenticate_kv=False, **options).copy_into(stored)

        def decode(stored: bytearray = stored) -> None:
            _decode(stored)

        seconds = medians({"encoded": encode, "decoded": decode}, max(1, repeats // 3))
        errors = [s.int8 for s in frame.layout.metadata.sections if s.int8 is not None]
        worst = (
            f"rms error {max(e.rms_error for e in errors):.2%} at most" if errors else "random values hardly compress"
        )
        figures.append(Figure(name, "bytes", len(stored) / size, "x", worst))
        figures += [Figure(name, what, 1000 * value, "ms") for what, value in seconds.items()]
    return figures


def _against_sdk(context: Context, python: Path, repeats: int, ours: float) -> list[Figure]:
    positions = len(context)
    shape = json.dumps([LAYERS, KV_HEADS, positions, HEAD_DIM, repeats])
    done = subprocess.run([python, "-c", _SDK_PROGRAM, shape], capture_output=True, text=True, check=False)
    if done.returncode:
        raise ConfigurationError(f"The reference SDK does not run in {python}: {done.stderr.strip()[-300:]}")
    theirs: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    total = 1000 * (theirs["encode"] + theirs["decode"])
    return [
        Figure("reference SDK", "encoded + decoded", total, "ms", f"avp {theirs['version']}, the same KV-cache"),
        Figure("reference SDK", "SDK / frames", total / ours, "x", "both in new memory"),
    ]


_SDK_PROGRAM = """
import json, statistics, sys, time
from importlib.metadata import version
import torch
from transformers import DynamicCache
from avp import AVPContext
layers, heads, positions, width, repeats = json.loads(sys.argv[1])
random = torch.Generator().manual_seed(0)
cache = DynamicCache()
for layer in range(layers):
    pair = [torch.randn(1, heads, positions, width, generator=random).bfloat16() for _ in range(2)]
    cache.update(*pair, layer)
context = AVPContext(past_key_values=cache, model_hash="", num_steps=0, seq_len=positions, model_family="",
                     hidden_dim=heads * width, num_layers=layers)
encode, decode = [], []
for repeat in range(repeats + 1):
    started = time.perf_counter()
    data = context.to_bytes()
    middle = time.perf_counter()
    AVPContext.from_bytes(data)
    ended = time.perf_counter()
    if repeat:
        encode.append(middle - started)
        decode.append(ended - middle)
print(json.dumps({"encode": statistics.median(encode), "decode": statistics.median(decode), "version": version("avp")}))
"""


def _kv(context: Context) -> HostKv:
    assert context.kv is not None
    return context.kv.to_host()


def _encode(context: Context, authenticate: bool) -> Any:
    return encode_context(context, key=_KEY, authenticate_kv=authenticate)


def _decode(data: bytearray | memoryview) -> None:
    decode_context(open_frame(data, key=_KEY, trust_kv=True))


def _update_each(data: np.ndarray, digest: Callable[[], Any]) -> None:
    """Take a digest of each of the KV-cache's sections' sizes."""
    for section in np.array_split(data, 2 * LAYERS):
        digest().update(memoryview(cast(Any, section)))


def _drain(context: Context) -> None:
    for _ in _encode(context, False):
        pass


def _stream(context: Context) -> None:
    reader = FrameReader(key=_KEY)
    for chunk in _encode(context, True):
        reader.feed(chunk)
    decode_context(reader.finish())


def _through_file(context: Context, path: Path) -> None:
    with path.open("wb") as file:
        _encode(context, False).write(file)
    decode_context(read_frame(path, key=_KEY, trust_kv=True))


def _peak_extra(work: Callable[[], None]) -> int | None:
    """Bytes that the process grows by at most while it works; None where the system does not tell."""
    peak = Path("/proc/self/clear_refs")
    if not peak.exists():
        return None
    work()
    peak.write_text("5")  # begin a new peak
    before = _status("VmRSS")
    work()
    return _status("VmHWM") - before


def _status(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith(field + ":"))
