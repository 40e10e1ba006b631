"""Parts of a run's process that the tests of whole runs cannot see."""

import asyncio
import queue

from jupyter_client.manager import AsyncKernelManager

from tokenbook.runs import execute


class Channel:
    """Gives the messages it was made with, then none; counts how often it was asked in vain."""

    def __init__(self, *messages):
        self.messages, self.n_empty = list(messages), 0

    async def get_msg(self, timeout=None):
        if self.messages:
            return self.messages.pop(0)
        self.n_empty += 1
        raise queue.Empty

    def is_alive(self):
        return True

    def stop(self):
        pass


def state(name):
    return {"msg_type": "status", "content": {"execution_state": name}}


def ready_client(monkeypatch, *published):
    """A client that has waited for a kernel which published this and replied to kernel_info."""
    client = execute.RunKernelClient(parent=AsyncKernelManager())
    reply = {"msg_type": "kernel_info_reply", "content": {"protocol_version": "5.4"}}
    client._shell_channel, client._iopub_channel = Channel(reply), Channel(*published)
    monkeypatch.setattr(client, "kernel_info", lambda: "id")
    asyncio.run(client.wait_for_ready(timeout=5))
    return client


def test_a_kernel_is_ready_as_soon_as_it_is_idle(monkeypatch):
    late = {"msg_type": "stream", "content": {"name": "stdout", "text": "late"}}
    client = ready_client(monkeypatch, state("busy"), state("idle"), late)
    assert client.iopub_channel.n_empty == 0
    assert asyncio.run(client.iopub_channel.get_msg()) is late  # the channel is the ordinary one again


def test_a_kernel_whose_idle_was_lost_is_waited_for_as_jupyter_does(monkeypatch):
    client = ready_client(monkeypatch, state("busy"))
    assert client.iopub_channel.n_empty == 1
