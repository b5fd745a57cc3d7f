"""Client of an OpenAI-compatible endpoint (vLLM, Ollama, llama.cpp, hosted models): chat completions.

What was paid for once is kept in a folder by the hash of its request, so that a run that goes on repeats no call. The
key comes from the environment alone, and stands in no error, no file and no log. An answer is data whatever it says:
`plain` bounds it and makes one line of it.
"""

from __future__ import annotations

import contextlib
import dataclasses
import email.utils
import hashlib
import http.client
import itertools
import json
import os
import queue
import random
import socket
import ssl
import threading
import time
import unicodedata
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

from sorax.errors import UserError

KEY_VARIABLE = "SORAX_API_KEY"
MAX_BYTES = 4 << 20  # of a response: longer ones are not read to their end
LATER = (408, 409, 425, 429, 500, 502, 503, 504, 529)  # statuses that may be another one the next time
LOCAL = ("localhost", "127.0.0.1", "::1")
# Characters that turn the direction of what follows them: a caption that shows them reads as another.
_TURNING = {chr(c) for c in (0x061C, 0x200E, 0x200F, *range(0x202A, 0x202F), *range(0x2066, 0x206A), 0xFEFF)}


class AnswerError(UserError):
    """One request got no answer that can be used; others may."""


class NoAnswerError(AnswerError):
    """There was no answer at all, however often it was asked for."""


@dataclasses.dataclass(frozen=True)
class EndpointConfig:
    """Where answers come from and how they are asked for.

    url: base, such as http://localhost:8000/v1. key_variable: of the environment; where it is not set, no key is sent.
    concurrency: requests at a time. timeout: seconds of one try, all of it. tries: of a request; between them
    `backoff` seconds, twice as long each time and up to `max_wait`, or what the server asks for (Retry-After).
    max_tokens, temperature: of an answer. price_in, price_out: of a million tokens. max_cost: in the same money, at
    which a run stops; 0: no limit. cache: folder of the answers; "": they are not kept.
    """

    url: str
    model: str
    key_variable: str = KEY_VARIABLE
    concurrency: int = 4
    timeout: float = 120.0
    tries: int = 6
    backoff: float = 1.0
    max_wait: float = 300.0
    max_tokens: int = 512
    temperature: float = 0.0
    price_in: float = 0.0
    price_out: float = 0.0
    max_cost: float = 0.0
    cache: str = ""

    def __post_init__(self):
        for name in ("concurrency", "timeout", "tries", "max_tokens"):
            if not getattr(self, name) > 0:
                raise UserError(f"endpoint: {name} is {getattr(self, name)}: it must be above 0")
        for name in ("backoff", "max_wait", "temperature", "price_in", "price_out", "max_cost"):
            if not 0 <= getattr(self, name) < float("inf"):
                raise UserError(f"endpoint: {name} is {getattr(self, name)}: give a number of at least 0")
        if not self.model:
            raise UserError("endpoint: no model: name one that the server has, with --model")
        if self.max_cost and not (self.price_in or self.price_out):
            raise UserError("endpoint: a limit on the cost needs prices: add --price-in and --price-out")
        self.address  # noqa: B018 (raises where the url cannot be used)

    @property
    def address(self) -> urllib.parse.SplitResult:
        """The parts of the address that is called."""
        try:
            parts = urllib.parse.urlsplit(self.url)
            port = parts.port
        except ValueError as error:
            raise UserError(f"endpoint: its address cannot be read ({error})") from None
        if parts.username or parts.password or parts.query or parts.fragment:
            # Not shown: what is in it may be the key.
            raise UserError(f"endpoint: the address holds a user, a password or a query: put the key into the "
                            f"environment, as {self.key_variable or KEY_VARIABLE}")  # fmt: skip
        if parts.scheme not in ("http", "https") or not parts.hostname or port == 0:
            raise UserError(f"endpoint: {self.url!r} is no address: write for example http://localhost:8000/v1")
        path = parts.path.rstrip("/") or "/v1"
        path = path if path.endswith("/chat/completions") else path + "/chat/completions"
        return parts._replace(path=path)


@dataclasses.dataclass(frozen=True)
class Answer:
    """text: as it came (see `plain`). finished: not cut at max_tokens. Token counts are None where none were told.
    cached: it was paid for before."""

    text: str
    finished: bool
    prompt_tokens: int | None
    completion_tokens: int | None
    cached: bool = False


class Usage:
    """What was asked and paid. Counts of calls (HTTP requests), retries among them, answers, answers from the cache,
    tokens of new answers, and new answers without a count."""

    def __init__(self, price_in: float, price_out: float):
        self._prices, self._lock = (price_in, price_out), threading.Lock()
        self.calls = self.retries = self.answers = self.cached = self.uncounted = 0
        self.prompt_tokens = self.completion_tokens = 0

    @property
    def cost(self) -> float:
        return (self._prices[0] * self.prompt_tokens + self._prices[1] * self.completion_tokens) / 1e6

    def add(self, **counts: int):
        with self._lock:
            for name, count in counts.items():
                setattr(self, name, getattr(self, name) + count)

    def line(self) -> str:
        """One line for people."""
        text = (f"{self.answers} answers in {self.calls} calls ({self.retries} tries again), {self.cached} from the "
                f"cache; {self.prompt_tokens} tokens sent, {self.completion_tokens} received")  # fmt: skip
        text += f", {self.uncounted} answers without a count" if self.uncounted else ""
        return text + (f"; cost {self.cost:.4f}" if any(self._prices) else "")


class _Later(Exception):
    """A try that failed and may succeed later; seconds: what the server asks to wait, or None."""

    def __init__(self, reason: str, seconds: float | None = None):
        super().__init__(reason)
        self.reason, self.seconds = reason, seconds


class Endpoint:
    """Answers of an endpoint; may be used from many threads. usage: see `Usage`.

    Raises:
        UserError: the key cannot be sent, or the cache folder cannot be made.
    """

    def __init__(self, config: EndpointConfig):
        self.config, self.usage = config, Usage(config.price_in, config.price_out)
        self._key = (os.environ.get(config.key_variable) or "").strip() if config.key_variable else ""
        if not (self._key.isascii() and self._key.isprintable()):
            raise UserError(f"endpoint: {config.key_variable} holds characters that no key has: set it again")
        self._not_before = 0.0  # of time.monotonic(): when the server wants to be asked again
        self._jitter = random.Random()
        self._asking = [threading.Lock() for _ in range(256)]  # equal requests wait for each other's answer
        if config.cache:  # made with the first answer, but what is in its way is said before any is paid for
            place = Path(config.cache).absolute()
            there = next(path for path in (place, *place.parents) if path.exists())
            if not there.is_dir() or not os.access(there, os.W_OK):
                raise UserError(f"endpoint: cache folder {config.cache!r} cannot be made in {str(there)!r}: name "
                                "another with --cache")  # fmt: skip

    @property
    def identity(self) -> str:
        """Hash of what answers depend on besides the messages."""
        return self._hash(self._body([], 0, None))

    def ask(self, messages: list[dict], *, seed: int = 0, max_tokens: int | None = None) -> Answer:
        """The answer to a chat; from the cache if it was given before.

        Args:
            messages: as the API has them: dict(role=, content=text or parts). seed: another one is another request.

        Raises:
            AnswerError: refused, or no answer in `tries`. UserError: the endpoint cannot be used at all, or the limit
                on the cost is reached.
        """
        body = self._body(messages, seed, max_tokens)
        key = self._hash(body)
        with self._asking[int(key[:2], 16)]:
            if (known := self._remembered(key)) is not None:
                self.usage.add(answers=1, cached=1)
                return known
            answer = self._paid(json.dumps(body).encode())
            self._remember(key, answer)
        return answer

    def _body(self, messages, seed, max_tokens):
        config = self.config
        return dict(model=config.model, messages=messages, max_tokens=max_tokens or config.max_tokens,
                    temperature=config.temperature, seed=seed)  # fmt: skip

    def _hash(self, body) -> str:
        text = json.dumps([self.config.address.geturl(), body], sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()

    # --- Cache

    def _place(self, key) -> Path:
        return Path(self.config.cache, key[:2], f"{key}.json")

    def _remembered(self, key) -> Answer | None:
        if not self.config.cache:
            return None
        try:
            return Answer(**json.loads(self._place(key).read_text()), cached=True)
        except (OSError, ValueError, TypeError):  # not there, or not whole: asked again
            return None

    def _remember(self, key, answer: Answer):
        if not self.config.cache:
            return
        path = self._place(key)
        part = path.with_name(f".{path.stem}.{os.getpid()}.{threading.get_ident()}.part")
        entry = {field.name: getattr(answer, field.name) for field in dataclasses.fields(Answer)}
        del entry["cached"]
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            part.write_text(json.dumps(entry))
            os.replace(part, path)
        except OSError as error:
            raise UserError(f"endpoint: an answer cannot be kept in {self.config.cache!r} ({error.strerror}): free "
                            "space, and run the same command again") from error  # fmt: skip

    # --- Calls

    def _paid(self, body: bytes) -> Answer:
        config, reason = self.config, ""
        for attempt in range(config.tries):
            if config.max_cost and self.usage.cost >= config.max_cost:
                raise UserError(f"endpoint: the limit on the cost, {config.max_cost:g}, is reached; what is done is "
                                "kept: raise --max-cost and run the same command again")  # fmt: skip
            time.sleep(max(0.0, self._not_before - time.monotonic()))
            self.usage.add(calls=1, retries=int(attempt > 0))
            try:
                answer = self._once(body)
            except _Later as error:
                reason = error.reason
                wait = min(config.backoff * 2**attempt, config.max_wait) * self._jitter.uniform(0.5, 1.0)
                if error.seconds is not None:
                    if error.seconds > config.max_wait:
                        raise UserError(f"endpoint: it asks to wait {error.seconds:.0f} s ({reason}), longer than "
                                        f"{config.max_wait:g}: run the same command again then") from None  # fmt: skip
                    wait = max(wait, error.seconds)
                    self._not_before = max(self._not_before, time.monotonic() + error.seconds)  # for all threads
                if attempt + 1 < config.tries:
                    time.sleep(wait)
                continue
            counts = dict(prompt_tokens=answer.prompt_tokens, completion_tokens=answer.completion_tokens)
            told = {name: count for name, count in counts.items() if count is not None}
            self.usage.add(answers=1, uncounted=int(not told), **told)
            return answer
        raise NoAnswerError(f"endpoint: no answer from {config.url} in {config.tries} tries; the last: {reason}")

    def _once(self, body: bytes) -> Answer:
        status, headers, data = self._post(body)
        if status != 200:
            reason = f"{status}: {self._said(data)}"
            if status in LATER and "insufficient_quota" not in reason:
                raise _Later(reason, _seconds(headers.get("Retry-After")))
            if status in (400, 413, 422):
                raise AnswerError(f"endpoint: it refuses a request, {reason}")
            remedy = {401: f"set {self.config.key_variable} to a key that it takes", 404: "check address and --model",
                      403: f"set {self.config.key_variable} to a key that it takes"}  # fmt: skip
            if 300 <= status < 400:  # not followed: the key is for this host alone
                reason, remedy[status] = f"{status}, it is elsewhere", "give the address that it has moved to"
            raise UserError(f"endpoint: {self.config.url} answers {reason}; "
                            f"{remedy.get(status, 'ask whoever runs it')}")  # fmt: skip
        try:
            found = json.loads(data)
            choice = found["choices"][0]
            text, usage = choice["message"]["content"], found.get("usage") or {}
            tokens = (usage.get("prompt_tokens"), usage.get("completion_tokens"))
        except (ValueError, RecursionError, LookupError, TypeError, AttributeError):
            raise _Later(f"no chat completion, but {self._said(data)}") from None
        if not isinstance(text, str) or not text.strip():
            raise _Later("an empty answer")
        tokens = (n if isinstance(n, int) and not isinstance(n, bool) and n >= 0 else None for n in tokens)
        return Answer(text, choice.get("finish_reason") != "length", *tokens)

    def _post(self, body: bytes):
        """(status, headers, bytes) of one call. Raises _Later where there is no whole response in time."""
        connection, expired, sockets = self._connection(), threading.Event(), []

        def expire():  # a server that sends a byte now and then keeps every read in time
            expired.set()
            for sock in sockets:
                with contextlib.suppress(OSError):
                    sock.shutdown(socket.SHUT_RDWR)

        timer = threading.Timer(self.config.timeout, expire)
        timer.daemon = True
        timer.start()
        try:
            headers = {"Content-Type": "application/json", "User-Agent": "sorax"}
            if self._key:
                headers["Authorization"] = f"Bearer {self._key}"
            connection.connect()
            sockets.append(connection.sock)  # the connection forgets it once a response has begun
            connection.request("POST", self.config.address.path, body, headers)
            response = connection.getresponse()
            data = response.read(MAX_BYTES + 1)
            if expired.is_set():
                raise TimeoutError
            if len(data) > MAX_BYTES:
                raise _Later(f"an answer of more than {MAX_BYTES} bytes")
            length = response.headers.get("Content-Length", "")
            if length.isdecimal() and len(data) < int(length):
                raise _Later(f"an answer that breaks off after {len(data)} of {length} bytes")
            return response.status, response.headers, data
        except ssl.SSLCertVerificationError as error:
            raise UserError(f"endpoint: the certificate of {self.config.url} is not trusted "
                            f"({error.verify_message})") from None  # fmt: skip
        except (OSError, http.client.HTTPException, ValueError) as error:
            late = expired.is_set() or isinstance(error, TimeoutError)
            what = f"nothing within {self.config.timeout:g} s" if late else self._scrubbed(error)
            raise _Later(f"{what} ({type(error).__name__})" if not late else what) from None
        finally:
            timer.cancel()
            connection.close()

    def _connection(self):
        parts, timeout = self.config.address, self.config.timeout
        secure = parts.scheme == "https"
        kind = http.client.HTTPSConnection if secure else http.client.HTTPConnection
        proxy = None if parts.hostname in LOCAL else urllib.request.getproxies().get(parts.scheme)
        if not proxy or urllib.request.proxy_bypass(parts.hostname):
            return kind(parts.hostname, parts.port, timeout=timeout)
        through = urllib.parse.urlsplit(proxy if "//" in proxy else f"//{proxy}")
        connection = kind(through.hostname, through.port or 80, timeout=timeout)
        connection.set_tunnel(parts.hostname, parts.port or (443 if secure else 80))
        return connection

    def _said(self, data: bytes) -> str:
        """What a response says, in a few words."""
        text = data[:4000].decode("utf-8", "replace")
        with contextlib.suppress(ValueError, RecursionError):
            found = json.loads(data)
            error = found.get("error", found) if isinstance(found, dict) else found
            if isinstance(error, dict) and isinstance(error.get("message"), str):
                text = f"{error['message']} {error.get('code') or ''}"
        return self._scrubbed(text) or "nothing"

    def _scrubbed(self, what) -> str:
        text = str(what)
        return plain(text.replace(self._key, "(key)") if self._key else text, 200)


def _seconds(value: str | None) -> float | None:
    """Seconds of a Retry-After header, which is a number or a date; None where it is neither."""
    if not value:
        return None
    with contextlib.suppress(ValueError):
        return max(0.0, float(value)) if float(value) < 1e9 else None
    with contextlib.suppress(ValueError, TypeError):
        return max(0.0, email.utils.parsedate_to_datetime(value).timestamp() - time.time())
    return None


def concurrently(function: Callable, items: Iterable, threads: int) -> Iterator[tuple]:
    """(item, result) in the order in which they are done; what `function` raises is the result.

    Items are taken as threads are free. The threads end with the program, whatever they wait for.
    """
    jobs, results, items, end = queue.SimpleQueue(), queue.SimpleQueue(), iter(items), object()

    def work():
        while (item := jobs.get()) is not end:
            try:
                results.put((item, function(item)))
            except Exception as error:
                results.put((item, error))

    for _ in range(threads):
        threading.Thread(target=work, daemon=True).start()
    waiting = 0
    try:
        for item in itertools.islice(items, threads):
            jobs.put(item)
            waiting += 1
        while waiting:
            done = results.get()
            waiting -= 1
            for item in itertools.islice(items, 1):
                jobs.put(item)
                waiting += 1
            yield done
    finally:
        for _ in range(threads):
            jobs.put(end)


def plain(text: str, most: int) -> str:
    """Text on one line, without control characters, in at most so many characters: cut after a sentence or a word.

    It is only ever data: instructions in it instruct nobody.
    """
    kept = (" " if c.isspace() else c for c in text if c.isspace() or (
        unicodedata.category(c) not in ("Cc", "Cs", "Cn", "Co") and c not in _TURNING))  # fmt: skip
    text = " ".join("".join(kept).split())
    if len(text) <= most:
        return text
    text = text[:most]
    end = max(text.rfind(mark) for mark in (". ", "! ", "? ", "。"))
    return text[: end + 1] if end > most // 2 else text.rpartition(" ")[0] or text
