"""The SQS and DynamoDB recipes of docs/failures.rst, run against a moto server in a separate process."""

import os
import re
import subprocess
import sys
import textwrap
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from microbatch import JobTooLarge
from tests.extras import needs

needs("boto3", "moto")
import boto3

PAGE = (Path(__file__).parent.parent / "docs" / "failures.rst").read_text(encoding="utf-8")

pytestmark = pytest.mark.server

# The server exits when its standard input is closed, so it never outlives the tests.
SERVER = """
import logging, sys
from moto.server import ThreadedMotoServer
logging.disable()
server = ThreadedMotoServer("127.0.0.1", 0, verbose=False)
server.start()
print(server.get_host_and_port()[1], flush=True)
sys.stdin.read()
"""


@pytest.fixture(scope="module")
def server() -> Iterator[str]:
    command = [sys.executable, "-c", SERVER]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdin is not None and process.stdout is not None
        yield f"http://127.0.0.1:{int(process.stdout.readline())}"
        process.stdin.close()
        assert 0 == process.wait(timeout=10)


@pytest.fixture(autouse=True)
def aws(server: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Point the recipes at the moto server through the environment, and hide the AWS settings of the machine."""
    for name in os.environ:
        if name.startswith("AWS_"):
            monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_ENDPOINT_URL", server)
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    for name in ("ACCESS_KEY_ID", "SECRET_ACCESS_KEY"):
        monkeypatch.setenv(f"AWS_{name}", "testing")
    monkeypatch.setenv("AWS_DEFAULT_REGION", "eu-west-1")
    monkeypatch.setenv("AWS_CONFIG_FILE", os.devnull)
    monkeypatch.setattr(boto3, "DEFAULT_SESSION", None)
    monkeypatch.setattr("tenacity.nap.time.sleep", lambda seconds: None)


class Interceptor:
    """Intercepts calls to the server: holds them until `go_on` is set, and withholds each entry in `throttled` once.

    moto always has capacity, but AWS does not. The reply reports a withheld entry as AWS does.
    """

    operation: str

    def __init__(self, client: Any) -> None:
        self.calls: list[list[str]] = []
        self.throttled: set[str] = set()
        self.called, self.go_on = threading.Event(), threading.Event()
        self._withheld: list[Any] = []
        service = client.meta.service_model.service_id.hyphenize()
        client.meta.events.register(f"provide-client-params.{service}.{self.operation}", self._forward)
        client.meta.events.register(f"after-call.{service}.{self.operation}", self._reply)

    def _forward(self, params: dict[str, Any], **_: Any) -> dict[str, Any]:
        self.called.set()
        assert self.go_on.wait(10)
        entries = self.entries(params)
        self.calls.append([self.name(entry) for entry in entries])
        self._withheld = [entry for entry in entries if self.name(entry) in self.throttled]
        self.throttled -= {self.name(entry) for entry in self._withheld}
        return self.params(params, [entry for entry in entries if entry not in self._withheld])

    def _reply(self, parsed: dict[str, Any], **_: Any) -> None:
        if self._withheld:
            self.report_withheld(parsed, self._withheld)

    def entries(self, params: dict[str, Any]) -> list[Any]:
        raise NotImplementedError

    def params(self, params: dict[str, Any], entries: list[Any]) -> dict[str, Any]:
        raise NotImplementedError

    def name(self, entry: Any) -> str:
        raise NotImplementedError

    def report_withheld(self, parsed: dict[str, Any], entries: list[Any]) -> None:
        raise NotImplementedError


class SendMessageBatch(Interceptor):
    operation = "SendMessageBatch"

    def entries(self, params: dict[str, Any]) -> list[Any]:
        return list(params["Entries"])

    def params(self, params: dict[str, Any], entries: list[Any]) -> dict[str, Any]:
        return {**params, "Entries": entries}

    def name(self, entry: Any) -> str:
        return str(entry["MessageBody"])

    def report_withheld(self, parsed: dict[str, Any], entries: list[Any]) -> None:
        reason = {"SenderFault": False, "Code": "InternalError"}
        parsed.setdefault("Failed", []).extend({"Id": entry["Id"], **reason} for entry in entries)


class BatchWriteItem(Interceptor):
    operation = "BatchWriteItem"

    def entries(self, params: dict[str, Any]) -> list[Any]:
        return list(params["RequestItems"]["orders"])

    def params(self, params: dict[str, Any], entries: list[Any]) -> dict[str, Any]:
        return {"RequestItems": {"orders": entries}}

    def name(self, entry: Any) -> str:
        return str(entry["PutRequest"]["Item"]["id"]["S"])

    def report_withheld(self, parsed: dict[str, Any], entries: list[Any]) -> None:
        parsed["UnprocessedItems"]["orders"] = entries


def recipe(call: str) -> dict[str, Any]:
    """Run the code block of the page that makes the *call*, and return its names."""
    blocks = re.findall(r"\.\. code-block:: python\n\n((?:    .*\n|\n)+)", PAGE)
    (block,) = [block for block in blocks if f".{call}(" in block]
    names: dict[str, Any] = {}
    exec(textwrap.dedent(block), names)
    return names


class Recipe:
    """The client and the batcher of a recipe, and the interceptor of its calls."""

    def __init__(self, client: Any, batcher: Any, interceptor: Interceptor) -> None:
        self.client = client
        self.batcher = batcher
        self.interceptor = interceptor

    def submit_together(self, jobs: list[Any]) -> list[Any]:
        """Submit the first job and, while its call is in progress, the others. Return all futures, settled."""
        futures = [self.batcher.submit(job) for job in jobs[:1]]
        assert self.interceptor.called.wait(10)
        futures += [self.batcher.submit(job) for job in jobs[1:]]
        self.interceptor.go_on.set()
        self.batcher.flush()
        return futures


# -- SQS --


@pytest.fixture
def sqs(aws: None) -> Iterator[Recipe]:
    client = boto3.client("sqs")
    client.create_queue(QueueName="orders")
    names = recipe("send_message_batch")
    with names["messages"] as batcher:
        yield Recipe(names["sqs"], batcher, SendMessageBatch(names["sqs"]))
    client.delete_queue(QueueUrl=names["queue"])
    client.close()
    names["sqs"].close()


def received(sqs: Recipe, count: int) -> dict[str, str]:
    """Take *count* messages from the queue, and return their bodies by their ids."""
    queue = sqs.client.get_queue_url(QueueName="orders")["QueueUrl"]
    got: dict[str, str] = {}
    while len(got) < count:
        for message in sqs.client.receive_message(QueueUrl=queue, MaxNumberOfMessages=10)["Messages"]:
            got[message["MessageId"]] = message["Body"]
    return got


def message(body: str, **more: Any) -> dict[str, Any]:
    return {"MessageBody": body, **more}


def test_each_caller_gets_its_own_message_id_and_no_batch_exceeds_ten_messages(sqs: Recipe) -> None:
    bodies = [f"message {number}" for number in range(25)]
    results = [future.result() for future in sqs.submit_together([message(body) for body in bodies])]
    assert received(sqs, 25) == dict(zip([result.value for result in results], bodies))
    assert [1, 10, 10, 4] == [len(call) for call in sqs.interceptor.calls]


def test_an_invalid_message_fails_alone_and_is_not_retried(sqs: Recipe) -> None:
    messages = [message("first"), message("good"), message("bad", DelaySeconds=901)]
    first, good, bad = sqs.submit_together(messages)
    assert {first.result().value: "first", good.result().value: "good"} == received(sqs, 2)
    assert isinstance(bad.exception(), ValueError) and "DelaySeconds" in str(bad.exception())
    assert [["first"], ["good", "bad"]] == sqs.interceptor.calls


def test_a_throttled_message_is_retried_alone(sqs: Recipe) -> None:
    sqs.interceptor.throttled = {"b"}
    futures = sqs.submit_together([message(body) for body in ("first", "a", "b", "c")])
    assert received(sqs, 4) == {future.result().value: future.job["MessageBody"] for future in futures}
    assert [["first"], ["a", "b", "c"], ["b"]] == sqs.interceptor.calls


def test_no_call_exceeds_the_byte_limit_and_a_larger_message_is_refused(sqs: Recipe) -> None:
    half = "é" * (1_048_576 // 4)
    with pytest.raises(JobTooLarge):
        sqs.batcher.submit(message(half + half + "e"))
    futures = sqs.submit_together([message(body) for body in ("first", half, half, "e")])
    assert [None] * 4 == [future.exception() for future in futures]
    assert [["first"], [half, half], ["e"]] == sqs.interceptor.calls


# -- DynamoDB --


@pytest.fixture
def dynamodb(aws: None) -> Iterator[Recipe]:
    client = boto3.client("dynamodb")
    client.create_table(
        TableName="orders",
        KeySchema=[{"AttributeName": "id", "KeyType": "HASH"}],
        AttributeDefinitions=[{"AttributeName": "id", "AttributeType": "S"}],
        BillingMode="PAY_PER_REQUEST",
    )
    names = recipe("batch_write_item")
    with names["orders"] as batcher:
        yield Recipe(names["dynamodb"], batcher, BatchWriteItem(names["dynamodb"]))
    client.delete_table(TableName="orders")
    client.close()
    names["dynamodb"].close()


def written(dynamodb: Recipe) -> dict[str, str]:
    items = dynamodb.client.scan(TableName="orders", ConsistentRead=True)["Items"]
    return {item["id"]["S"]: item["what"]["S"] for item in items}


def item(key: str, what: str = "tea") -> dict[str, Any]:
    return {"id": {"S": key}, "what": {"S": what}}


def test_every_item_is_written_and_no_batch_exceeds_twenty_five_items(dynamodb: Recipe) -> None:
    keys = [str(number) for number in range(60)]
    futures = dynamodb.submit_together([item(key) for key in keys])
    assert [None] * 60 == [future.result().value for future in futures]
    assert dict.fromkeys(keys, "tea") == written(dynamodb)
    assert [1, 25, 25, 9] == [len(call) for call in dynamodb.interceptor.calls]


def test_an_unprocessed_item_is_retried_alone(dynamodb: Recipe) -> None:
    dynamodb.interceptor.throttled = {"b"}
    futures = dynamodb.submit_together([item(key) for key in ("first", "a", "b", "c")])
    assert [None] * 4 == [future.result().value for future in futures]
    assert {"first", "a", "b", "c"} == set(written(dynamodb))
    assert [["first"], ["a", "b", "c"], ["b"]] == dynamodb.interceptor.calls


def test_of_two_items_with_the_same_key_in_a_batch_the_later_one_is_written(dynamodb: Recipe) -> None:
    futures = dynamodb.submit_together([item("first"), item("a", "tea"), item("b"), item("a", "milk")])
    assert [None] * 4 == [future.result().value for future in futures]
    assert {"first": "tea", "a": "milk", "b": "tea"} == written(dynamodb)
    assert [["first"], ["a", "b"]] == dynamodb.interceptor.calls
