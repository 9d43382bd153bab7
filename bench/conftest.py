"""Stored runs carry the device's name and no host name, and are compared with runs of the same device only."""

import pytest

from bench.common import append_json, default_device, provenance


def pytest_addoption(parser):
    parser.addoption("--record", help="append each benchmark's extra_info to this file, a JSON line each, as it ends")


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_makereport(item, call):
    """Unlike --benchmark-json, keeps what was measured before a run is cut short, and why a figure is missing."""
    report = (yield).get_result()
    benchmark, path = item.funcargs.get("benchmark"), item.config.getoption("--record")
    if not path or (call.when != "call" and report.passed):
        return
    if report.passed and benchmark is not None and benchmark.extra_info:
        append_json(path, {"name": item.name, **benchmark.extra_info})
    elif not report.passed:
        why = report.longrepr[2] if report.skipped else str(call.excinfo.value)
        append_json(path, {"name": item.name, "skipped" if report.skipped else "failed": why[:500]})


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
