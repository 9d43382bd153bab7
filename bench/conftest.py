"""Stored runs carry the device's name and no host name, and are compared with runs of the same device only."""

import json

import pytest

from bench.common import default_device, provenance


def pytest_addoption(parser):
    parser.addoption("--record", help="append each benchmark's extra_info to this file, a JSON line each, as it ends")


@pytest.hookimpl(trylast=True)
def pytest_runtest_teardown(item):
    """Unlike --benchmark-json, keeps what was measured before a run is cut short."""
    benchmark, path = item.funcargs.get("benchmark"), item.config.getoption("--record")
    if path and benchmark is not None and benchmark.extra_info:
        with open(path, "a") as file:
            file.write(json.dumps({"name": item.name, **benchmark.extra_info}) + "\n")


def pytest_benchmark_update_machine_info(config, machine_info):
    found = provenance(default_device(), command="pytest bench")
    machine_info.pop("node", None)
    machine_info.update(device=found["device"], versions=found["versions"])


@pytest.hookimpl(tryfirst=True)
def pytest_benchmark_compare_machine_info(config, benchmarksession, machine_info, compared_benchmark):
    then = compared_benchmark["machine_info"].get("device")
    if then != machine_info["device"]:
        raise pytest.UsageError(f"the stored run is from {then!r}, this is {machine_info['device']!r}: not comparable")


@pytest.fixture(scope="session")
def device():
    return default_device()
