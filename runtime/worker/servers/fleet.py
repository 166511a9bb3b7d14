"""Run a fleet of workers on Ray Serve: shards by layer range, replicas of each, placed, watched and replaced by Ray.

Ray carries no ciphertext. Each replica listens on a port of its own and clients talk to it directly. Ray Serve answers over
HTTP with the directory of those addresses (`hecompile.runtime.transports.directory`). So Ray's own limits on the size of
messages do not matter, and Ray sees no request.

Ray's own ports (dashboard, GCS, object manager) have no authentication: whoever reaches them runs code on the machines.
They must not be reachable from outside; see docs/fleet.md.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field

from hecompile.bundles.worker import WorkerBundle
from hecompile.errors import InputError
from hecompile.extras import install_command
from hecompile.runtime.recipes.document import load_document, resolve_paths
from hecompile.runtime.recipes.section import Section
from hecompile.runtime.wire.address import UnixAddress, parse_address
from hecompile.runtime.worker.servers.fleet_room import await_workers, check_room
from hecompile.runtime.worker.shards import layer_count, shard, split_layers

APPLICATION, REGISTRY = "hecompile", "hecompile-registry"
STALE_SECONDS = 15.0
"""Time without a report after which a replica is not listed; it reports with every health check."""
HEALTH_SECONDS = 3.0
_START_SECONDS = 120.0
_PATH_KEYS = ("bundle", "tls_certificate", "tls_key", "client_authority", "token_file")


class FleetFile(Section):
    """Hold the YAML file of `hecompile worker deploy`. Relative paths are relative to it.

    * `bundle`: the worker bundle, on every machine under the same path (or on shared storage).
    * `shards`: into how many layer ranges it is cut; `replicas`: how many workers of each.
    * `listen`: what each replica listens on; port 0 is any free one.
    * `cpus_per_replica`, `gpus_per_replica`: what Ray reserves for each.
    * `http_port`: of the directory, on this machine.
    """

    command = "worker deploy"

    bundle: Path
    shards: Annotated[int, Field(ge=1)] = 1
    replicas: Annotated[int, Field(ge=1)] = 1
    engine: str = "auto"
    listen: str = "tcp://127.0.0.1:0"
    allow_plaintext_network: bool = False
    cpus_per_replica: Annotated[float, Field(ge=0)] = 1.0
    gpus_per_replica: Annotated[float, Field(ge=0)] = 0.0
    http_port: Annotated[int, Field(ge=0, le=65535)] = 8000
    tls_certificate: Path | None = None
    tls_key: Path | None = None
    client_authority: Path | None = None
    token_file: Path | None = None


def load_fleet(path: Path) -> FleetFile:
    """Read and check a fleet's file. Raises InputError that names the key, or the file that cannot be read."""
    fleet = load_document(path, (), FleetFile, _resolve)
    address = parse_address(fleet.listen)
    if isinstance(address, UnixAddress) or (fleet.shards * fleet.replicas > 1 and address.port != 0):
        raise InputError(f"{path}: listen: {fleet.listen} cannot be the address of several workers; give HOST:0")
    return fleet


def _resolve(document: dict[str, Any], directory: Path) -> None:
    resolve_paths(document, [(name,) for name in _PATH_KEYS], directory)


class Registry:
    """Keep the addresses of the replicas, and when each last reported; an actor of Ray."""

    def __init__(self) -> None:
        self._seen: dict[str, float] = {}

    def report(self, address: str) -> None:
        """Note that the worker at that address is well."""
        self._seen[address] = time.monotonic()

    def workers(self) -> list[str]:
        """Return the addresses that reported within the last `STALE_SECONDS`."""
        now = time.monotonic()
        self._seen = {address: seen for address, seen in self._seen.items() if now - seen < STALE_SECONDS}
        return sorted(self._seen)


class ShardReplica:
    """Serve one worker in a thread; Ray checks its health."""

    def __init__(self, fleet: FleetFile, layers: tuple[int, int]) -> None:
        import ray

        from hecompile.runtime.wire.credentials import ServerCredentials
        from hecompile.runtime.worker.servers.serve import serve
        from hecompile.runtime.worker.worker import Worker

        bundle = shard(WorkerBundle.open(fleet.bundle), range(*layers))
        files = (fleet.tls_certificate, fleet.tls_key, fleet.client_authority, fleet.token_file)
        credentials = ServerCredentials.load(*files)
        self._registry: Any = ray.get_actor(REGISTRY, namespace=APPLICATION)
        self._address = ""
        started = threading.Event()
        failure: list[BaseException] = []

        def ready(address: str) -> None:
            self._address = address
            started.set()

        def run() -> None:
            try:
                serve(
                    Worker(bundle, fleet.engine),
                    fleet.listen,
                    ready=ready,
                    stop=threading.Event(),
                    allow_plaintext_network=fleet.allow_plaintext_network,
                    credentials=credentials,
                )
            except BaseException as error:
                failure.append(error)
                started.set()
                raise

        self._thread = threading.Thread(target=run, daemon=True)
        self._thread.start()
        if not started.wait(_START_SECONDS) or failure:
            raise InputError(f"the worker of layers {layers[0]}-{layers[1] - 1} did not start: {failure or 'too slow'}")
        self.check_health()

    def check_health(self) -> None:
        """Report to the registry; Ray calls this. Raises RuntimeError when the server has ended."""
        if not self._thread.is_alive():
            raise RuntimeError("the worker's server has ended")
        self._registry.report.remote(self._address)


class Directory:
    """Answer HTTP requests with the addresses of the workers."""

    def __init__(self, plan_id: str) -> None:
        import ray

        self._plan_id = plan_id
        self._registry: Any = ray.get_actor(REGISTRY, namespace=APPLICATION)

    async def __call__(self, request: Any) -> dict[str, Any]:
        return {"plan_id": self._plan_id, "workers": await self._registry.workers.remote()}


def deploy(fleet: FleetFile, tell: Callable[[str], None] = lambda text: None) -> str:
    """Start the fleet; returns the address of its directory once every replica is up. An interrupt ends it at once.

    It runs on the Ray cluster that this process is connected to, or on a new one of this machine.

    Args:
        fleet: what is started.
        tell: takes a line about what is waited for, every few seconds.

    Raises:
        InputError: Ray is not installed, the bundle cannot be opened or cut into so many shards, the cluster has no room for
            the replicas, or they did not start.
    """
    try:
        import ray
        from ray import serve
    except ImportError:
        raise InputError(f"a fleet needs Ray Serve: {install_command('fleet')}") from None
    bundle = WorkerBundle.open(fleet.bundle)
    ranges = split_layers(layer_count(bundle), fleet.shards)
    if not ray.is_initialized():
        ray.init(namespace=APPLICATION, include_dashboard=False, log_to_driver=False, configure_logging=False)
    check_room(fleet, [node["Resources"] for node in ray.nodes() if node["Alive"]])
    # num_cpus=0: it only keeps a list.
    registry = ray.remote(Registry).options(
        name=REGISTRY, namespace=APPLICATION, lifetime="detached", get_if_exists=True, num_cpus=0
    ).remote()  # fmt: skip
    serve.start(http_options={"host": "127.0.0.1", "port": fleet.http_port})
    resources = {"num_cpus": fleet.cpus_per_replica, "num_gpus": fleet.gpus_per_replica}
    targets = []
    for index, layers in enumerate(ranges):
        worker = serve.deployment(
            ShardReplica,
            name=f"shard-{index}",
            num_replicas=fleet.replicas,
            ray_actor_options=resources,
            health_check_period_s=HEALTH_SECONDS,
        )
        bound = worker.bind(fleet, (layers.start, layers.stop))
        targets.append(serve.RunTarget(bound, name=f"{APPLICATION}-{index}", route_prefix=None))
    directory = serve.deployment(Directory, name="directory", ray_actor_options={"num_cpus": 0})
    targets.append(serve.RunTarget(directory.bind(bundle.plan_id), name=APPLICATION, route_prefix="/workers"))
    # Not waited for in there, where nothing is said and no time is limited.
    serve.run_many(targets, wait_for_ingress_deployment_creation=False, wait_for_applications_running=False)
    await_workers(
        lambda: len(ray.get(registry.workers.remote())),
        fleet.shards * fleet.replicas,
        lambda: {name: (str(one.status.value), one.message) for name, one in serve.status().applications.items()},
        tell,
    )
    return f"http://127.0.0.1:{fleet.http_port}/workers"


def stop() -> None:
    """End the fleet and, where this process started it, Ray. Does nothing where none was started."""
    try:
        import ray
        from ray import serve
    except ImportError:
        return

    serve.shutdown()
    ray.shutdown()
