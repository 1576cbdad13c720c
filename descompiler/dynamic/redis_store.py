"""Deltas of dynamic tables in Redis: one hash, whose fields are what are files in a directory."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from descompiler.dynamic.stores import Summed
from descompiler.errors import InputError

PIECE_BYTES = 1 << 26
"""Of a field: a value of Redis has 512 MiB at most."""


class RedisStore:
    """A store in Redis, through its own client: a hash under one key.

    What is written is in fields of its own, in pieces if it is large; the field that says how many comes with the last
    one, in one command. That it is on a disk is the server's business (``appendonly``).

    Parameters
    ----------
    server : str or redis.Redis
        A URL, as ``redis://localhost:6379/0``, or a client, without ``decode_responses``.
    key : str

    Raises
    ------
    InputError
        If the client library is missing, or a call of it fails.

    Examples
    --------
    Needs redis, ``pip install descompiler[redis]``::

        deltas = des.dynamic.Deltas(des.dynamic.RedisStore("redis://localhost", "user-rows"), {"user": model.user})
    """

    def __init__(self, server: Any, key: str):
        try:
            import redis
        except ImportError as error:
            if isinstance(server, str):
                raise InputError("RedisStore needs the client redis: pip install descompiler[redis]") from error
            self._errors: tuple[type[Exception], ...] = (OSError,)
        else:
            self._errors = (OSError, redis.RedisError)
        self._client: Any = redis.Redis.from_url(server) if isinstance(server, str) else server
        self.key = key

    def __str__(self) -> str:
        return f"the hash {self.key!r} of Redis"

    def names(self) -> list[str]:
        fields = self._call("hkeys")
        if any(isinstance(x, str) for x in fields):
            raise InputError(f"{self} was given a client that decodes: make it with decode_responses=False")
        return sorted(x.decode() for x in fields if b"#" not in x)

    def read(self, name: str) -> bytes:
        pieces = self._pieces(name)
        found: list[Any] = self._call("hmget", pieces) if pieces else [None]
        if any(x is None for x in found):
            raise FileNotFoundError(name)
        return b"".join(found)

    def write(self, name: str, parts: Iterable[Any]) -> tuple[int, int]:
        passed, held, count = Summed(), bytearray(), 0
        for part in parts:
            held += passed(part)
            while len(held) > PIECE_BYTES:
                self._call("hset", f"{name}#{count}", bytes(held[:PIECE_BYTES]))
                count, held = count + 1, held[PIECE_BYTES:]
        last = {f"{name}#{count}": bytes(held), name: str(count + 1).encode()}
        self._call("hset", mapping=last)
        return passed.bytes, passed.crc

    def remove(self, names: Iterable[str]) -> None:
        for name in names:
            self._call("hdel", name, *self._pieces(name))

    def _pieces(self, name: str) -> list[str]:
        """The fields of what is there."""
        return [f"{name}#{i}" for i in range(int(self._call("hget", name) or 0))]

    def _call(self, name: str, *arguments: Any, **options: Any) -> Any:
        try:
            return getattr(self._client, name)(self.key, *arguments, **options)
        except self._errors as error:
            raise InputError(f"{self}: {name} failed with {type(error).__name__}: {error}") from error
