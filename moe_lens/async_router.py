"""A thin async face for services: the same `ExpertRouter`, in one thread of its own.

MLX streams belong to the thread that made them, so loading and every call share one thread; calls
are queued and run one after another.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, asynccontextmanager
from types import TracebackType
from typing import TYPE_CHECKING, Any, TypeVar

from .generation import Generation
from .info import ModelInfo
from .instrument import Capture
from .routed_model import RoutedModel

if TYPE_CHECKING:
    from mlx_lm.generate import GenerationResponse

T = TypeVar("T")


class AsyncExpertRouter:
    """`ExpertRouter` for ``async with``; `router` is the object itself.

    Example:
        ```python
        async with await ExpertRouter.from_pretrained_async("demo") as router:
            async with router.capture() as seen:
                await router.generate("23+48=", max_tokens=3)
        ```
    """

    def __init__(self, router: RoutedModel, executor: ThreadPoolExecutor) -> None:
        self.router = router
        self._executor = executor

    @classmethod
    async def start(cls, load: Callable[[], RoutedModel]) -> AsyncExpertRouter:
        """Call `load` in the thread that later runs the model."""
        executor = ThreadPoolExecutor(max_workers=1, thread_name_prefix="moe-lens")
        loop = asyncio.get_running_loop()
        try:
            router = await loop.run_in_executor(executor, load)
        except BaseException:
            executor.shutdown(wait=False)
            raise
        return cls(router, executor)

    @property
    def info(self) -> ModelInfo:
        return self.router.info

    async def call(self, function: Callable[..., T], *args: Any, **options: Any) -> T:
        """Run a function in the router's thread: ``await r.call(r.router.forward, ids)``."""
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self._executor, lambda: function(*args, **options))

    async def generate(self, prompt: str, **options: Any) -> Generation:
        return await self.call(self.router.generate, prompt, **options)

    async def stream(self, prompt: str, **options: Any) -> AsyncIterator[GenerationResponse]:
        """Pieces of text as they come; leaving the loop early ends the generation."""
        pieces: Iterator[GenerationResponse] = self.router.stream(prompt, **options)
        try:
            while (piece := await self.call(next, pieces, None)) is not None:
                yield piece
        finally:
            await self.call(pieces.close)  # type: ignore[attr-defined]

    @asynccontextmanager
    async def capture(self, *values: str, **options: Any) -> AsyncIterator[Capture]:
        async with self._entered(self.router.capture(*values, **options)) as seen:
            yield seen

    @asynccontextmanager
    async def override(self, *args: Any, **options: Any) -> AsyncIterator[None]:
        async with self._entered(self.router.override(*args, **options)):
            yield

    @asynccontextmanager
    async def _entered(self, manager: AbstractContextManager[T]) -> AsyncIterator[T]:
        value = await self.call(manager.__enter__)
        try:
            yield value
        except BaseException as error:
            await self.call(manager.__exit__, type(error), error, error.__traceback__)
            raise
        await self.call(manager.__exit__, None, None, None)

    async def __aenter__(self) -> AsyncExpertRouter:
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        await self.close()

    async def close(self) -> None:
        """Detach everything and end the thread."""
        await self.call(self.router.close)
        self._executor.shutdown(wait=False)
