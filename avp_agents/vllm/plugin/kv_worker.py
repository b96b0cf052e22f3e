"""The worker's side of the store connector: fetches in the background, writes between steps, saves what is asked."""

from __future__ import annotations

import logging
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING

from avp_agents.context import Context
from avp_agents.errors import AvpError, ContextLostError, FingerprintMismatchError, IntegrityError
from avp_agents.kv_cache import HostKv
from avp_agents.store import ContextStore
from avp_agents.vllm.plugin.kv_blocks import KvBlocks
from avp_agents.vllm.plugin.kv_request import PromptStart

if TYPE_CHECKING:
    from avp_agents.vllm.served_model import ServedModel

log = logging.getLogger(__name__)

THREADS = 4


@dataclass(frozen=True, eq=False)
class KvMove:
    """Keys and values of one request, to be loaded or saved.

    Attributes:
        request_id: vLLM's name of it.
        handle_id: The context's.
        prompt: The positions from 0 to the last one that moves.
        block_ids: The request's blocks.
        start: First position to be loaded.
    """

    request_id: str
    handle_id: str
    prompt: PromptStart
    block_ids: list[int]
    start: int = 0


class Mover:
    """Moves keys and values between a worker's blocks and a store.

    Args:
        store: The store, shared with the engine's callers.
        blocks: The worker's.
        block_size: As vLLM's scheduler counts.
        model: Says which model this is; called in the background.
    """

    def __init__(
        self, store: ContextStore, blocks: KvBlocks, block_size: int, model: Callable[[], ServedModel]
    ) -> None:
        self._store, self._blocks, self._block_size = store, blocks, block_size
        self._model = model
        self._pool = ThreadPoolExecutor(THREADS, thread_name_prefix="avp-kv")
        self._loading: dict[str, tuple[KvMove, Future[HostKv]]] = {}

    def load(self, move: KvMove) -> None:
        """Begin to fetch."""
        self._loading[move.request_id] = move, self._pool.submit(self._fetch, move)

    def finish_loads(self) -> tuple[set[str], dict[str, tuple[KvMove, str]]]:
        """Write what has been fetched since the last call.

        Returns:
            Requests that wait no longer, and those among them that have nothing, each with the reason.
        """
        ended = {request_id for request_id, (_, fetched) in self._loading.items() if fetched.done()}
        failed: dict[str, tuple[KvMove, str]] = {}
        for request_id in ended:
            move, fetched = self._loading.pop(request_id)
            error = fetched.exception()
            if error is None:
                self._blocks.write(fetched.result(), move.block_ids, move.start, len(move.prompt), self._block_size)
            elif isinstance(error, AvpError):
                log.warning("Keys and values of %s were not loaded: %s", move.handle_id, error)
                failed[request_id] = move, str(error)
            else:
                log.error("Loading keys and values of %s failed", move.handle_id, exc_info=error)
                failed[request_id] = move, f"{type(error).__name__}: {error}"
        return ended, failed

    def save(self, move: KvMove) -> None:
        """Copy a request's keys and values, and store them in the background. Its blocks are free when this returns."""
        kv = self._blocks.read(move.block_ids, len(move.prompt), self._block_size)
        if kv is not None:
            self._pool.submit(self._keep, move, kv)

    def close(self) -> None:
        """Finish what was begun."""
        self._pool.shutdown()
        self._store.close()

    def _fetch(self, move: KvMove) -> HostKv:
        """The context's keys and values.

        Raises:
            AvpError: The store does not have them, or they are not this request's.
        """
        context = self._stored(move)
        if context.kv is None or context.kv.length < len(move.prompt):
            raise ContextLostError(f"The store holds no keys and values for {len(move.prompt)} positions.")
        kv = context.kv.to_host(0, len(move.prompt))
        self._blocks.check(kv)
        return kv

    def _keep(self, move: KvMove, kv: HostKv) -> None:
        try:
            context = self._stored(move)
            context.attach(kv=kv)
            if not self._store.add_kv(context):
                log.warning("Keys and values of %s were not kept: the context is gone.", move.handle_id)
        except AvpError as error:
            log.warning("Keys and values of %s were not kept: %s", move.handle_id, error)
        except Exception:  # nobody waits for the outcome, so this is where it is told
            log.exception("Keeping keys and values of %s failed", move.handle_id)

    def _stored(self, move: KvMove) -> Context:
        """The context that a request names, if the request begins with it.

        Raises:
            FingerprintMismatchError, IntegrityError: It is another model's, or another prompt's.
        """
        context, model = self._store.get(move.handle_id), self._model()
        dtype = str(self._blocks.dtype).removeprefix("torch.")
        if (context.fingerprint, context.dtype) != (model.fingerprint, dtype):
            raise FingerprintMismatchError("The context is another model's, or in another dtype.")
        if not move.prompt.begins(context.lineage, lambda ids: model.embeddings_of(ids, self._blocks.dtype)):
            raise IntegrityError("The request's prompt is not the context that it names.")
        return context
