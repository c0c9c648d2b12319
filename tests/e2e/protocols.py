"""A small mail server and its client, to be run in a pod: server-first in plaintext, or STARTTLS.

protocols.py serve PORT CERTIFICATE KEY
protocols.py call HOST PORT plain|starttls FILE   writes "OK FAILED" after each request, what failed on a line behind
"""

import asyncio
import contextlib
import ssl
import sys
import time
from pathlib import Path

EVERY_S = 0.2
TIMEOUT_S = 5.0


async def serve(port: int, certificate: str, key: str) -> None:
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    context.load_cert_chain(certificate, key)

    async def session(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(OSError, asyncio.IncompleteReadError):
            writer.write(b"220 mail ready\r\n")
            while line := await reader.readline():
                word = line.strip().upper()
                if word == b"STARTTLS":
                    writer.write(b"220 go on\r\n")
                    await writer.drain()
                    await writer.start_tls(context)
                else:
                    writer.write(b"221 bye\r\n" if word == b"QUIT" else b"250 ok\r\n")
        writer.close()

    servers = [await asyncio.start_server(session, host, port) for host in ("0.0.0.0", "::")]
    await asyncio.gather(*(server.serve_forever() for server in servers))


async def request(host: str, port: int, *, starttls: bool) -> None:
    reader, writer = await asyncio.open_connection(host, port)
    try:
        await expect(reader, b"220")
        if starttls:
            writer.write(b"STARTTLS\r\n")
            await expect(reader, b"220")
            context = ssl.create_default_context()
            context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
            await writer.start_tls(context)
        for word, answer in ((b"NOOP", b"250"), (b"QUIT", b"221")):
            writer.write(word + b"\r\n")
            await expect(reader, answer)
    finally:
        writer.close()


async def expect(reader: asyncio.StreamReader, code: bytes) -> None:
    line = await reader.readline()
    if not line.startswith(code):
        raise ConnectionError(f"{line!r} where {code!r} was expected")


async def call(host: str, port: int, kind: str, file: Path) -> None:
    ok = failed = 0
    why = ""
    while True:
        began = time.monotonic()
        try:
            await asyncio.wait_for(request(host, port, starttls=kind == "starttls"), TIMEOUT_S)
            ok += 1
        except (OSError, asyncio.IncompleteReadError, TimeoutError) as error:
            failed += 1
            why = repr(error)
        fresh = file.with_suffix(".new")
        fresh.write_text(f"{ok} {failed}\n{why}\n")
        fresh.rename(file)
        await asyncio.sleep(max(0.0, EVERY_S - (time.monotonic() - began)))


def main(words: list[str]) -> None:
    match words:
        case ["serve", port, certificate, key]:
            asyncio.run(serve(int(port), certificate, key))
        case ["call", host, port, kind, file]:
            asyncio.run(call(host, int(port), kind, Path(file)))
        case _:
            sys.exit(__doc__)


if __name__ == "__main__":
    main(sys.argv[1:])
