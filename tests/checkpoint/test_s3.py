"""Sharded checkpoints on an S3 server, which runs in this process."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import boto3
import fsspec
import pytest
from lightning_cases import assert_same
from moto.server import ThreadedMotoServer
from sharded_cases import everything, fit

from lightning_zinf.checkpoint.source import Checkpoint
from lightning_zinf.cli import main


@pytest.fixture
def bucket(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    server = ThreadedMotoServer(port=0, verbose=False)
    server.start()
    try:
        host, port = server.get_host_and_port()
        endpoint = f"http://{host}:{port}"
        monkeypatch.setenv("AWS_ACCESS_KEY_ID", "testing")
        monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "testing")
        monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
        monkeypatch.setitem(fsspec.config.conf, "s3", {"client_kwargs": {"endpoint_url": endpoint}})
        boto3.client("s3", endpoint_url=endpoint).create_bucket(Bucket="runs")
        fsspec.get_filesystem_class("s3").clear_instance_cache()
        yield "s3://runs"
    finally:
        server.stop()


def test_save_resume_and_tools(bucket: str, tmp_path: Path) -> None:
    url = f"{bucket}/a/last.ckpt"
    _, used = fit(tmp_path, "nvme", 1)
    for _ in range(2):  # the second takes the place of the first
        used.save_checkpoint(url)
    with Checkpoint(url) as source:
        assert len(source.folder.names()) == 4
    resumed, again = fit(tmp_path, "none", 2, path=url)
    whole, plain = fit(tmp_path, "nvme", 2)
    assert_same(everything(resumed, again), everything(whole, plain))
    assert main(["verify", url]) == 0
    assert main(["consolidate", url, str(tmp_path / "one.ckpt")]) == 0
    used.strategy.remove_checkpoint(url)
    assert not fsspec.filesystem("s3").exists(url)
