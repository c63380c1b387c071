"""Runs a real Milvus server until its standard input closes; for the Python of `.venv-milvus`, which has one.

    .venv-milvus/bin/python tests/app/milvus_child.py DATA_DIR [PORT]

Prints one line of JSON when the server answers: its address, and the process to kill for a crash.
"""

import contextlib
import fcntl
import json
import os
import signal
import socket
import sys
from pathlib import Path

import milvus  # type: ignore[import-not-found, unused-ignore]  # only that environment has it

# What was written is seen after a tick of the server's clock; the default of 200 ms would make tests wait.
QUICKER = {
    "PROXY_TIMETICKINTERVAL": "10",
    "QUERYCOORD_CHECKCHANNELINTERVAL": "50",
    "QUERYCOORD_CHECKSEGMENTINTERVAL": "50",
    "QUERYCOORD_DISTPULLINTERVAL": "50",
    "QUERYCOORD_LEADERVIEWUPDATEINTERVAL": "1",
    "LOG_LEVEL": "warn",
}
COMPONENTS = ("ROOTCOORD", "PROXY", "QUERYCOORD", "QUERYNODE", "INDEXNODE", "DATACOORD", "DATANODE")
UNPACKED = Path(sys.prefix) / "milvus-server"


def main(data_dir: Path, port: int | None) -> None:
    """Starts, says where, waits for the end of standard input, and stops."""
    unpack_once()
    data_dir.mkdir(parents=True, exist_ok=True)
    with contextlib.suppress(FileExistsError):  # after a crash it is there
        (data_dir / "bin").symlink_to(UNPACKED / "bin")
    config = milvus.MilvusServerConfig(data_dir=str(data_dir))
    port_keys = [key for key in config.configurable_items if key.endswith("_port")]
    peer_port, web_port, *ports = free_ports(2 + len(port_keys))
    config.update(**dict(zip(port_keys, ports, strict=True)))
    if port:
        config.update(proxy_port=port)
    os.environ |= QUICKER | {f"{component}_IP": "127.0.0.1" for component in COMPONENTS}
    # Without such a file the etcd inside takes its well-known ports, whatever the server was told.
    os.environ["ETCD_CONFIG_PATH"] = str(
        etcd_config(data_dir, client_port=config.configs["etcd_port"], peer_port=peer_port)
    )
    server = milvus.MilvusServer(config)
    server.webservice_port = web_port
    signal.signal(signal.SIGTERM, lambda *_: sys.exit())
    try:
        server.start()
        address = {"url": f"http://127.0.0.1:{server.listen_port}", "pid": server.server_proc.pid}
        sys.stdout.write(json.dumps(address) + "\n")
        sys.stdout.flush()
        sys.stdin.read()
    finally:
        server.stop()


def unpack_once() -> None:
    """Unpacks the server's 250 MB beside its package, not into each data directory."""
    UNPACKED.mkdir(exist_ok=True)
    with (UNPACKED / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        milvus._initialize_data_files(str(UNPACKED))


def etcd_config(data_dir: Path, *, client_port: int, peer_port: int) -> Path:
    """Where the server's own etcd shall listen, and keep its data."""
    client, peer = f"http://127.0.0.1:{client_port}", f"http://127.0.0.1:{peer_port}"
    settings = {
        "name": "default",
        "data-dir": str(data_dir / "data" / "etcd.data"),
        "listen-client-urls": client,
        "advertise-client-urls": client,
        "listen-peer-urls": peer,
        "initial-advertise-peer-urls": peer,
        "initial-cluster": f"default={peer}",
        "log-level": "error",
    }
    path = data_dir / "etcd.yaml"
    path.write_text("".join(f"{key}: {json.dumps(value)}\n" for key, value in settings.items()))
    return path


def free_ports(count: int) -> list[int]:
    """Ports that nobody has at the moment, each another one."""
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for one in sockets:
            one.bind(("127.0.0.1", 0))
        return [one.getsockname()[1] for one in sockets]


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]) if len(sys.argv) > 2 else None)
