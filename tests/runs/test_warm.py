"""Warm kernels: as good as cold ones in everything but the time they take to start."""

import json
import os
import shutil
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import nbformat
import psutil
import pytest
from jupyter_client.manager import start_new_kernel
from nbformat import v4
from process_watch import gone, processes_with

from tokenbook.runs import warm

pytestmark = pytest.mark.skipif(not warm.available(), reason="this system does not fork safely")


def child(template, tmp_path, code, env=None, cwd=None):
    """Run `python -m probe` as a fork of the template and return what it printed as JSON."""
    shutil.rmtree(tmp_path / "__pycache__", ignore_errors=True)  # of the same second it would count as new
    (tmp_path / "probe.py").write_text(textwrap.dedent(code))
    env = {**os.environ, "PYTHONPATH": str(tmp_path), **(env or {})}
    with open(tmp_path / "out", "w+b") as out:
        argv, fd = [sys.executable, "-m", "probe"], out.fileno()
        process = warm.fork(argv, env, str(cwd or tmp_path), fd, fd, template.address())
        status = process.wait(60)
        out.seek(0)
        text = out.read().decode()
    assert status == 0, text
    return json.loads(text.strip().splitlines()[-1])


def template_of(tmp_path, name, code):
    """A template that preloads a module with the given code, found through PYTHONPATH."""
    (tmp_path / f"{name}.py").write_text(textwrap.dedent(code))
    template = warm.Template([name])
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(tmp_path))
        template.address()
    return template


def test_a_child_has_its_own_environment_folder_session_and_signals(light_template, tmp_path):
    (tmp_path / "elsewhere").mkdir()
    code = """
        import json, os, signal, sys, multiprocessing
        handlers = {s.name: str(signal.getsignal(s)) for s in (signal.SIGINT, signal.SIGTERM, signal.SIGCHLD)}
        print(json.dumps(dict(
            environment=dict(os.environ), cwd=os.getcwd(),
            leader=os.getpid() == os.getpgid(0) == os.getsid(0),
            handlers=handlers, blocked=[int(s) for s in signal.pthread_sigmask(signal.SIG_BLOCK, ())],
            argv=sys.argv, path=sys.path[:2], daemon=multiprocessing.current_process().daemon,
            fds=len(os.listdir("/proc/self/fd")), stdin=os.readlink("/proc/self/fd/0"),
        )))
    """
    found = child(light_template, tmp_path, code, {"ONLY_THIS": "1"}, tmp_path / "elsewhere")
    assert found["environment"]["ONLY_THIS"] == "1"
    assert warm.TEMPLATE_ENV not in found["environment"]
    assert found["cwd"] == str(tmp_path / "elsewhere")
    assert found["leader"]
    assert found["handlers"]["SIGINT"].startswith("<built-in function default_int_handler")
    assert {found["handlers"]["SIGTERM"], found["handlers"]["SIGCHLD"]} == {"0"}
    assert found["blocked"] == []
    assert found["path"] == [str(tmp_path / "elsewhere"), str(tmp_path)]
    assert not found["daemon"]  # else a DataLoader's workers could not be started in a notebook
    assert found["fds"] < 12
    assert found["stdin"] == os.devnull
    second = child(light_template, tmp_path, code)
    assert "ONLY_THIS" not in second["environment"]


def test_no_part_of_tokenbook_is_in_a_child_and_an_edit_is_seen_by_the_next(light_template, tmp_path):
    (tmp_path / "tokenbook").mkdir()
    code = """
        import json, sys
        before = [name for name in sys.modules if name.split('.')[0] == 'tokenbook']
        import tokenbook
        print(json.dumps([before, tokenbook.VALUE]))
    """
    for value in (1, 22):
        (tmp_path / "tokenbook" / "__init__.py").write_text(f"VALUE = {value}\n")
        assert child(light_template, tmp_path, code, {"PYTHONDONTWRITEBYTECODE": "1"} if 0 else None) == [
            [],
            value,
        ]


def test_the_full_template_only_imports(full_template):
    assert not [name for name in full_template.preload if name.split(".")[0] == "tokenbook"]
    process = warm.fork([sys.executable, "-c"], dict(os.environ), address=full_template.address())
    process.wait(120)  # the template answers: all is imported
    tasks = f"/proc/{full_template.pid}/task"
    others = [task for task in os.listdir(tasks) if task != str(full_template.pid)]
    assert {Path(tasks, task, "comm").read_text().strip() for task in others} <= {"jemalloc_bg_thd"}


def test_siblings_draw_different_random_numbers(full_template, tmp_path):
    code = """
        import json, random, numpy, torch
        print(json.dumps([random.random(), numpy.random.rand(), torch.rand(1).item(), torch.initial_seed()]))
    """
    first, second = (child(full_template, tmp_path, code) for _ in range(2))
    assert all(a != b for a, b in zip(first, second, strict=True))


def test_a_seed_gives_the_same_numbers_warm_and_cold(full_template, tmp_path):
    code = """
        import json, random, numpy, torch
        random.seed(1); numpy.random.seed(1); torch.manual_seed(1)
        print(json.dumps([random.random(), numpy.random.rand(), torch.rand(1).item()]))
    """
    ours = child(full_template, tmp_path, code)
    cold = subprocess.run([sys.executable, "-m", "probe"], cwd=tmp_path, capture_output=True, check=True)
    assert ours == json.loads(cold.stdout)


@pytest.mark.parametrize("threads", [1, 2])
def test_children_run_parallel_torch_operations_on_the_threads_given(full_template, tmp_path, threads):
    code = """
        import json, torch
        from threadpoolctl import threadpool_info
        x = torch.randn(600, 600, requires_grad=True)
        # Hangs in a child of a template that has run a parallel operation itself.
        (torch.softmax(x @ x, -1) ** 2).sum().backward()
        pools = {p['num_threads'] for p in threadpool_info() if p['user_api'] == 'blas'}
        print(json.dumps([torch.get_num_threads(), sorted(pools), bool(x.grad.isfinite().all())]))
    """
    env = {"OMP_NUM_THREADS": str(threads), "OPENBLAS_NUM_THREADS": str(threads)}
    for _ in range(2):
        assert child(full_template, tmp_path, code, env) == [threads, [threads], True]


def test_a_template_with_a_cuda_context_or_with_threads_is_not_used(tmp_path):
    context = "class cuda:\n    is_initialized = staticmethod(lambda: True)\nMARK = 1"
    thread = "import threading, time\nthreading.Thread(target=time.sleep, args=(600,), daemon=True).start()"
    code = "import json, sys; print(json.dumps([m for m in ('torch', 'threaded') if m in sys.modules]))"
    for name, source in (("torch", context), ("threaded", thread)):
        template = template_of(tmp_path, name, source)
        try:
            assert child(template, tmp_path, code) == []  # a cold process: nothing was preloaded
            assert "cold start" in (tmp_path / "out").read_text()
        finally:
            template.stop()


def test_a_setting_that_is_read_at_import_starts_a_child_cold(light_template, tmp_path):
    code = "import json, sys; print(json.dumps([sys.flags.hash_randomization, 'papermill' in sys.modules]))"
    assert child(light_template, tmp_path, code)[1] is True
    assert child(light_template, tmp_path, code, {"PYTHONHASHSEED": "0"}) == [0, False]


def test_exit_status_and_signals_reach_the_launcher(light_template, tmp_path):
    (tmp_path / "ends.py").write_text("import os, sys\nexec(os.environ['CODE'])")
    env = {**os.environ, "PYTHONPATH": str(tmp_path)}

    def status(code):
        with open(os.devnull, "wb") as null:
            argv, fd = [sys.executable, "-m", "ends"], null.fileno()
            address = light_template.address()
            return warm.fork(argv, {**env, "CODE": code}, str(tmp_path), fd, fd, address).wait(30)

    assert status("sys.exit(3)") == 3
    assert status("1 / 0") == 1
    assert status("os.kill(os.getpid(), 9)") == -9
    marker = tmp_path / "atexit"
    assert status(f"import atexit; atexit.register(open, {str(marker)!r}, 'w')") == 0
    assert marker.exists()


@pytest.fixture
def kernel(light_template, monkeypatch):
    """A kernel started through jupyter_client with the provisioner named in the environment."""
    from jupyter_client.provisioning import KernelProvisionerFactory

    monkeypatch.setenv("JUPYTER_DEFAULT_PROVISIONER_NAME", "tokenbook-warm")
    KernelProvisionerFactory.clear_instance()
    monkeypatch.setattr(warm, "template", light_template)
    manager, client = start_new_kernel(kernel_name="python3")
    yield manager, client
    client.stop_channels()
    manager.shutdown_kernel(now=True)
    KernelProvisionerFactory.clear_instance()


def answer(client, code, timeout=30):
    reply = client.execute_interactive(
        f"_answer = ({code})", user_expressions={"_": "_answer"}, timeout=timeout
    )
    return reply["content"]


def test_interrupting_a_kernel_stops_the_cell_and_keeps_the_kernel(kernel):
    manager, client = kernel
    assert isinstance(manager.provisioner, warm.WarmProvisioner)
    assert isinstance(manager.provisioner.process, warm.ForkedProcess)
    message = client.execute("import time; time.sleep(60)")
    time.sleep(1)
    manager.interrupt_kernel()
    while (reply := client.get_shell_msg(timeout=15))["parent_header"]["msg_id"] != message:
        pass
    assert reply["content"]["ename"] == "KeyboardInterrupt"
    assert answer(client, "1 + 1")["user_expressions"]["_"]["data"]["text/plain"] == "2"


def test_a_restarted_kernel_is_a_new_process(kernel):
    manager, client = kernel
    before = manager.provisioner.pid
    client.execute_interactive("leftover = 1", timeout=15)
    manager.restart_kernel(now=True)
    client.wait_for_ready(timeout=30)
    assert manager.provisioner.pid != before
    assert answer(client, "'leftover' in globals()")["user_expressions"]["_"]["data"]["text/plain"] == "False"
    assert not psutil.pid_exists(before)


def test_the_ordinary_provisioner_is_used_where_fork_is_missing(kernel, monkeypatch):
    manager, client = kernel
    monkeypatch.setattr(warm, "available", lambda: False)
    manager.restart_kernel(now=True)
    client.wait_for_ready(timeout=60)
    assert isinstance(manager.provisioner.process, subprocess.Popen)


def test_a_dead_template_is_started_again(tmp_path):
    template = warm.Template(["json"])
    try:
        assert child(template, tmp_path, "print(1)") == 1
        os.kill(template.pid, signal.SIGKILL)
        time.sleep(0.2)
        assert child(template, tmp_path, "print(2)") == 2
    finally:
        template.stop()


def test_a_template_that_dies_takes_its_children_along(tmp_path):
    template = warm.Template(["json"])
    env = {**os.environ, "PYTHONPATH": str(tmp_path)}
    (tmp_path / "stays.py").write_text("import time; time.sleep(600)")
    process = warm.fork([sys.executable, "-m", "stays"], env, str(tmp_path), address=template.address())
    template.stop()
    assert process.wait(10) in (255, -9)
    assert gone(lambda: psutil.pid_exists(process.pid))


def notebook(path, code):
    cell = v4.new_code_cell(code)
    kernel = {"name": "python3", "display_name": "Python 3", "language": "python"}
    nbformat.write(v4.new_notebook(cells=[cell], metadata={"kernelspec": kernel}), path)


def tool_environment(tmp_path):
    """An environment with a small template; nothing but the template imports colorsys."""
    return {
        **os.environ,
        "JUPYTER_DEFAULT_PROVISIONER_NAME": "tokenbook-warm",
        "TOKENBOOK_PRELOAD": "ipykernel.ipkernel,ipykernel.kernelapp,colorsys",
        "MARK_OF_THE_TEST": str(tmp_path),
    }


def test_papermill_uses_warm_kernels_and_leaves_nothing_running(tmp_path):
    notebook(tmp_path / "in.ipynb", "import sys; print('colorsys' in sys.modules)")
    command = [sys.executable, "-m", "papermill", "in.ipynb", "out.ipynb"]
    subprocess.run(command, cwd=tmp_path, env=tool_environment(tmp_path), check=True, capture_output=True)
    text = nbformat.read(tmp_path / "out.ipynb", 4).cells[0].outputs[0].text
    assert text == "True\n"
    assert gone(lambda: processes_with(str(tmp_path)), 5)


def test_nbval_uses_warm_kernels_and_leaves_nothing_running(tmp_path):
    notebook(tmp_path / "in.ipynb", "import sys; assert 'colorsys' in sys.modules")
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-p",
        "no:cacheprovider",
        "--nbval-lax",
        "--nbval-current-env",
    ]
    done = subprocess.run(
        [*command, "in.ipynb"], cwd=tmp_path, env=tool_environment(tmp_path), capture_output=True, text=True
    )
    assert "1 passed" in done.stdout, done.stdout
    assert gone(lambda: processes_with(str(tmp_path)), 5)


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_a_killed_launcher_leaves_neither_kernel_nor_template(tmp_path, number):
    notebook(tmp_path / "in.ipynb", f"open({str(tmp_path / 'running')!r}, 'w'); import time; time.sleep(600)")
    command = [sys.executable, "-m", "papermill", "in.ipynb", "out.ipynb"]
    process = subprocess.Popen(
        command,
        cwd=tmp_path,
        env=tool_environment(tmp_path),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    assert gone(lambda: not (tmp_path / "running").exists(), 60)
    assert len(processes_with(str(tmp_path))) >= 3  # papermill, template, kernel
    process.send_signal(number)
    process.wait(15)
    assert gone(lambda: processes_with(str(tmp_path)), 5)


def test_a_jupyter_server_uses_warm_kernels_and_leaves_nothing_running(tmp_path):
    code = f"""
import asyncio, os, signal
from jupyter_server.services.kernels.kernelmanager import AsyncMappingKernelManager
async def main():
    manager = AsyncMappingKernelManager(root_dir={str(tmp_path)!r})
    kernels = [await manager.start_kernel(kernel_name="python3") for _ in range(2)]
    processes = [manager.get_kernel(k).provisioner.process for k in kernels]
    print(sorted({{type(p).__name__ for p in processes}}), len({{p.pid for p in processes}}))
    await manager.shutdown_all(now=True)
asyncio.run(main())
"""
    env = tool_environment(tmp_path)
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True, timeout=120)
    assert done.stdout.strip() == "['ForkedProcess'] 2", done.stderr
    assert gone(lambda: processes_with(str(tmp_path)), 5)
