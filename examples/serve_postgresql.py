"""Starts a PostgreSQL server with an empty database, prints its address, and serves it until Ctrl-C.

    $ apt-get install postgresql
    $ python examples/serve_postgresql.py
    postgresql://postgres@127.0.0.1:43211/postgres

If the installation starts a server too, this program does not touch that server.
"""

import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from contextlib import closing
from pathlib import Path


def program(name: str) -> str:
    """Return the path of a program of PostgreSQL, in the newest version."""
    debian = sorted(Path("/usr/lib/postgresql").glob(f"*/bin/{name}"), key=lambda path: int(path.parts[-3]))
    found = str(debian[-1]) if debian else shutil.which(name)
    if found is None:
        sys.exit(f"{name} was not found: install PostgreSQL")
    return found


def main() -> None:
    """Create a database in a temporary folder, and serve it."""
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: sys.exit(0))
    with closing(socket.create_server(("127.0.0.1", 0))) as free:
        port = free.getsockname()[1]
    with tempfile.TemporaryDirectory() as folder:
        user: list[str] = []
        if os.geteuid() == 0:  # the server refuses to run as root
            user = ["runuser", "-u", "postgres", "--"]
            shutil.chown(folder, "postgres")
        data = f"{folder}/data"
        options = ["--no-sync", "--auth=trust", "--username=postgres", "--encoding=UTF8"]
        initdb = [*user, program("initdb"), "-D", data, *options]
        subprocess.run(initdb, cwd="/", check=True, stdout=subprocess.DEVNULL)
        server = [*user, program("postgres"), "-D", data, "-k", folder, "-h", "127.0.0.1", "-p", str(port)]
        with subprocess.Popen(server, cwd="/", stderr=subprocess.DEVNULL) as process:
            try:
                ready = [program("pg_isready"), "--quiet", "-h", "127.0.0.1", "-p", str(port)]
                while process.poll() is None and subprocess.run(ready, check=False).returncode:
                    time.sleep(0.05)
                if process.poll() is not None:
                    sys.exit("the server did not start")
                print(f"postgresql://postgres@127.0.0.1:{port}/postgres", flush=True)
                process.wait()
            finally:
                # Not a clean shutdown, because the data is deleted with the folder.
                stop = [*user, program("pg_ctl"), "-D", data, "stop", "-m", "immediate", "--silent"]
                subprocess.run(stop, cwd="/", check=False)


if __name__ == "__main__":
    main()
