"""The promises of powermeter.py, tested on the real parts.

Each test talks to a real mosquitto and, over a pseudo serial line, to the script as
its user starts it: a copy with the default settings, but for those that the test is
about, run as a process. Frames are written out as bytes, their CRC is computed here.

In the README's environment:

    python3 -m pytest             runs the tests
    python3 test_powermeter.py    plays a sunny day to look at, with nothing connected
"""

import contextlib
import importlib.util
import json
import os
import pty
import random
import re
import select
import shutil
import signal
import socket
import struct
import subprocess
import sys
import tempfile
import termios
import threading
import time
import tty
from collections import deque
from math import pi, sin
from pathlib import Path

import paho.mqtt.client as mqtt
import pytest
import serial

HERE = Path(__file__).parent
SCRIPT = (HERE / "powermeter.py").read_text()
TOPIC, STATUS = "electricity/hp/restpower", "electricity/hp/meter"
MOSQUITTO = shutil.which("mosquitto", path=os.environ["PATH"] + ":/usr/sbin")
DEFAULTS = """
topic = "electricity/hp/restpower"
mqtt_server = "localhost"
mqtt_port = 1883
mqtt_username = ""
mqtt_password = ""
mqtt_tls = False
mqtt_ca_file = ""
max_age = 300
status_topic = ""
serial_port = "/dev/ttyUSB0"
baudrate = 19200
parity = "E"
stopbits = 1
unit_id = 60
surplus_sign = 1
log_level = "INFO"
"""
NO_MOSQUITTO = "mosquitto is missing, install it with: sudo apt install mosquitto"


# ------------------------------ The parts of the rig ------------------------------
def crc(data):
    """Return the Modbus RTU CRC of data as its two bytes, the low one first."""
    value = 0xFFFF
    for byte in data:
        value ^= byte
        for _ in range(8):
            value = value >> 1 ^ (0xA001 if value & 1 else 0)
    return struct.pack("<H", value)


def frame(text):
    """Return the RTU frame for bytes written in hex, with its CRC."""
    data = bytes.fromhex(text)
    return data + crc(data)


def eventually(condition, seconds=10.0, what="the condition"):
    """Wait until condition() is true and return its value; fail after some seconds."""
    end = time.monotonic() + seconds
    while not (value := condition()):
        assert time.monotonic() < end, f"waited {seconds} s in vain for {what}"
        time.sleep(0.005)
    return value


class Broker:
    """A mosquitto on a free port, and a client to publish with."""

    def __init__(self, folder, config="allow_anonymous true", **login):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        self.config, self.log = folder / "mosquitto.conf", folder / "mosquitto.log"
        lines = f"user root\nlistener {self.port} 127.0.0.1\n{config}\n"
        self.config.write_text(lines)
        self.login, self.process, self.client = login, None, None

    def start(self):
        if self.process:
            return self
        if not MOSQUITTO:
            sys.exit(NO_MOSQUITTO)
        with self.log.open("a") as log:
            self.process = subprocess.Popen(
                [MOSQUITTO, "-v", "-c", self.config],
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        eventually(self.listens, what="mosquitto to listen")
        return self

    def listens(self):
        with contextlib.suppress(OSError):
            socket.create_connection(("127.0.0.1", self.port)).close()
            return True

    def connect(self):
        """Return a client of our own, connected."""
        client = mqtt.Client(mqtt.CallbackAPIVersion.VERSION2)
        if self.login:
            client.username_pw_set(self.login["username"], self.login["password"])
        client.connect("127.0.0.1", self.port)
        client.loop_start()
        eventually(client.is_connected, what="the publisher's login")
        return client

    def publish(self, payload, topic=TOPIC, retain=False):
        self.client = self.client or self.connect()
        self.client.publish(topic, payload, qos=1, retain=retain).wait_for_publish(5)

    def kill(self):
        if self.client:
            self.client.disconnect()
            self.client.loop_stop()
            self.client = None
        if self.process:
            self.process.kill()
            self.process.wait()
            self.process = None


SPEEDS = (1200, 2400, 4800, 9600, 19200, 38400, 57600, 115200)
# A pseudo serial line knows its speed, but no parity, which this adds; it also lets the
# computer sleep, and does what a test asks for. The script runs it before its own lines.
SITE = """
import os, termios, time
FOLDER, BITS, noted = os.environ["RIG"], termios.PARENB | termios.PARODD, 0
get, set_, clock = termios.tcgetattr, termios.tcsetattr, time.clock_gettime
def tcgetattr(fd):
    values = get(fd)
    return [*values[:2], values[2] | noted, *values[3:]]
def tcsetattr(fd, when, values):
    global noted
    noted = values[2] & BITS
    letter = "N" if not noted else "O" if noted & termios.PARODD else "E"
    with open(FOLDER + "/new", "w") as file:
        file.write(letter)
    os.replace(FOLDER + "/new", FOLDER + "/parity")
    set_(fd, when, [*values[:2], values[2] & ~BITS, *values[3:]])
def clock_gettime(number):
    slept = os.path.exists(FOLDER + "/slept") and number == time.CLOCK_BOOTTIME
    return clock(number) + 1000 * slept
termios.tcgetattr, termios.tcsetattr = tcgetattr, tcsetattr
time.clock_gettime = clock_gettime
exec(os.environ["SABOTAGE"])
"""


class Line:
    """A serial line: the adapter's end for the script, the heat pump's end for us.

    What one end sends is rubbish to the other unless both have the same speed and parity.
    """

    def __init__(self, folder):
        self.folder, self.port, self.ends = folder, folder / "ttyUSB0", ()
        self.speaks = (19200, "E")  # the heat pump's end

    def plug(self):
        self.ends = pty.openpty()
        for end in self.ends:
            tty.setraw(end)
        self.port.symlink_to(os.ttyname(self.ends[1]))
        return self

    def settings(self):
        """Return speed and parity that the script has set; None before that."""
        if not (self.folder / "parity").exists():
            return None
        speed = termios.tcgetattr(self.ends[0])[5]
        names = {getattr(termios, f"B{number}"): number for number in SPEEDS}
        return names[speed], (self.folder / "parity").read_text()

    def pull(self):
        self.port.unlink(missing_ok=True)
        for end in self.ends:
            os.close(end)
        self.ends = ()

    def send(self, data):
        if self.settings() != self.speaks:
            seed = f"{self.settings()}{self.speaks}{data.hex()}"
            data = random.Random(seed).randbytes(len(data))
        os.write(self.ends[0], data)

    def hear(self, seconds):
        """Return what comes within some seconds, at once when something comes."""
        ready, _, _ = select.select([self.ends[0]], [], [], seconds)
        return os.read(self.ends[0], 4096) if ready else b""

    def ask(self, request, seconds=1.0):
        """Send a request and return all that comes until it is a whole frame."""
        self.send(request)
        return self.answer(seconds)

    def answer(self, seconds=1.0):
        data, end = b"", time.monotonic() + seconds
        while (left := end - time.monotonic()) > 0:
            data += self.hear(left)
            if len(data) > 4 and crc(data) == b"\0\0":
                break
        return data

    def registers(self, wire, count, unit=60):
        """Read some registers and return them as signed numbers."""
        request = struct.pack(">BBHH", unit, 3, wire, count)
        data = self.ask(request + crc(request))
        assert len(data) == 5 + 2 * count, f"read {wire}, {count}: got {data.hex(' ')}"
        return struct.unpack(f">{count}h", data[3:-2])

    def power(self, unit=60):
        """Return the three phases and the total, in 10 W, as one read shows them."""
        values = self.registers(37, 14, unit)
        return values[0], values[5], values[10], values[13]

    def shows(self, *power):
        eventually(lambda: self.power() == power, what=f"{power} on the line")


class Script:
    """powermeter.py as a process of a copy with edited settings."""

    def __init__(self, folder, text=SCRIPT, sabotage="", **settings):
        defaults = dict(line.split(" = ", 1) for line in DEFAULTS.strip().splitlines())
        changed = {name: repr(value) for name, value in settings.items()}
        for name, value in {**defaults, **changed}.items():
            line = f"{name} = {value}"
            text, found = re.subn(rf"(?m)^{name} = .*$", lambda _: line, text)  # noqa: B023
            assert found == 1, f"{found} lines set {name}"
        self.file, self.output = folder / "powermeter.py", folder / "powermeter.log"
        self.file.write_text(text)
        (folder / "sitecustomize.py").write_text(SITE)
        rig = {"RIG": str(folder), "PYTHONPATH": str(folder), "SABOTAGE": sabotage}
        self.process, self.environment = None, {**os.environ, **rig}

    def start(self, *prefix, output=None):
        with self.output.open("a") as log:
            self.process = subprocess.Popen(
                [*prefix, sys.executable, self.file],
                stdout=output or log,
                stderr=output or log,
                env=self.environment,
                start_new_session=True,
            )
        return self

    def log(self):
        return self.output.read_text()

    def says(self, text, times=1):
        """Wait until a text stands in the log, as often as it is asked for."""
        what = f"{times} times {text!r} in the log"
        eventually(lambda: self.log().count(text) >= times, what=what)

    def stop(self, number=signal.SIGTERM):
        """Send a signal, and return the exit status and the seconds that it took."""
        begin = time.monotonic()
        self.process.send_signal(number)
        return self.process.wait(10), time.monotonic() - begin

    def kill(self):
        if self.process:
            self.process.kill()
            self.process.wait()


class Rig(contextlib.ExitStack):
    """Broker, line and script in a folder of their own; nothing stays behind."""

    def __init__(self, broker=None, **settings):
        super().__init__()
        self.folder = Path(self.enter_context(tempfile.TemporaryDirectory()))
        self.broker = Broker(self.folder, **(broker or {}))
        self.line = Line(self.folder)
        parts = {"mqtt_port": self.broker.port, "serial_port": str(self.line.port)}
        self.script = Script(self.folder, **{**parts, **settings})
        for part in (self.broker.kill, self.line.pull, self.script.kill):
            self.callback(part)

    def begin(self):
        """Start all three, and wait for nothing."""
        self.broker.start()
        self.line.plug()
        self.script.start()
        return self

    def start(self):
        """Start all three, and wait until the script is connected and answers."""
        self.begin().script.says("connected to the MQTT broker")
        self.script.says("the meter is on the line")
        return self

    def serve(self, watts=3000):
        """Publish a rest power that 30 divides, and wait until the line shows it."""
        self.broker.publish(str(watts))
        self.line.shows(watts // 30, watts // 30, watts // 30, watts // 10)


@pytest.fixture(scope="session", autouse=True)
def mosquitto():
    if not MOSQUITTO:
        pytest.exit(NO_MOSQUITTO, returncode=1)


@pytest.fixture
def rig():
    """Return a function that builds a rig, not yet started, with settings."""
    with contextlib.ExitStack() as stack:
        yield lambda **settings: stack.enter_context(Rig(**settings))


@pytest.fixture(scope="module")
def meter():
    """One running rig with the default settings for all tests that disturb nothing."""
    with Rig() as shared:
        yield shared.start()


# --------------------------------- What goes over ---------------------------------
READS = [frame(f"3C 03 00 {wire} 00 01") for wire in ("25", "2A", "2F", "32")]


@pytest.mark.parametrize(
    ("payload", "phase", "total"),
    [
        ("3000", "00 64", "01 2C"),  # 100 and 300
        ("1000", "00 21", "00 64"),  # 33 and 100
        ("-500", "FF EF", "FF CE"),  # -17 and -50
        ("327670", "2A AA", "7F FF"),  # 10922 and 32767
        ("-327670", "D5 56", "80 01"),  # -10922 and -32767
        ("0", "00 00", "00 00"),
        ("-1", "00 00", "00 00"),
        (" \t3000\r\n", "00 64", "01 2C"),
        ("+3000", "00 64", "01 2C"),
        ("2999.7", "00 64", "01 2C"),
        ("3e3", "00 64", "01 2C"),
        ("-.5E+3", "FF EF", "FF CE"),
    ],
)
def test_value_is_read_as_a_third_on_each_phase_and_in_total(
    meter, payload, phase, total
):
    phase, total = frame(f"3C 03 02 {phase}"), frame(f"3C 03 02 {total}")
    meter.broker.publish("7777")
    meter.line.shows(259, 259, 259, 778)
    meter.broker.publish(payload)
    eventually(lambda: meter.line.ask(READS[0]) == phase, what=payload)
    answers = [meter.line.ask(request) for request in READS]
    assert answers == [phase, phase, phase, total]


def test_surplus_is_negative_where_the_heat_pump_wants_it(rig):
    rig = rig(surplus_sign=-1).start()
    rig.broker.publish("3000")
    rig.line.shows(-100, -100, -100, -300)
    rig.broker.publish("-500")
    rig.line.shows(17, 17, 17, 50)


def test_before_the_first_message_there_is_no_surplus(rig):
    assert rig().start().line.power() == (0, 0, 0, 0)


def test_registers_change_while_nobody_polls_and_outlive_the_adapter(rig):
    # what the datastore holds is printed, since asking for it would be a poll
    sabotage = """
import threading
def spy():
    from pymodbus.simulator import simruntime
    build = simruntime.SimRuntime.__init__
    def init(self, device):
        build(self, device)
        watch.append(self.block["x"][2])
    simruntime.SimRuntime.__init__ = init
    while True:
        time.sleep(0.05)
        print("datastore", [registers[50] for registers in watch[-1:]], flush=True)
watch = []
threading.Thread(target=spy, daemon=True).start()
"""
    rig = rig(sabotage=sabotage).start()
    for watts in (3000, 600):
        rig.broker.publish(str(watts))
        rig.script.says(f"datastore [{watts // 10}]")
        rig.line.pull()
        rig.script.says("is not there", times=1 if watts == 3000 else 2)
        rig.broker.publish(str(watts + 30))
        rig.script.says(f"datastore [{watts // 10 + 3}]")
        rig.line.plug()
        rig.script.says("the meter is on the line", times=2 if watts == 3000 else 3)
        rig.line.shows(*3 * (watts // 30 + 1,), watts // 10 + 3)


BAD_PAYLOADS = [b"", b"  ", b"unavailable", b"nan", b"-inf", b"1_000", b"[3000]"]
BAD_PAYLOADS += ["٣٠٠٠".encode(), "３０００".encode(), b'{"value": 3000}', b"0x10"]
BAD_PAYLOADS += [b"\xff\x00\x1b[2J\n", b"3000,5", b"3000 W", b"1000 2000", b"--5"]
BAD_PAYLOADS += [b"327671", b"-327670.5", b"1e999"]


@pytest.mark.parametrize("payload", BAD_PAYLOADS)
def test_bad_value_means_no_surplus_until_a_good_one(meter, payload):
    meter.serve()
    errors = meter.script.log().count("is no rest power in W")
    meter.broker.publish(payload)
    meter.line.shows(0, 0, 0, 0)
    meter.script.says("is no rest power in W", times=errors + 1)
    meter.serve()


def test_bad_value_is_logged_in_one_line_cut_to_80_characters(meter):
    meter.broker.publish("x" * 100_000 + "\n")
    meter.script.says("'" + "x" * 80 + "'")
    meter.broker.publish("first\nsecond \x1b[31m red")
    meter.script.says(r"'first\nsecond \x1b[31m red'")


def test_value_older_than_max_age_is_no_surplus_until_the_next(rig):
    rig = rig(max_age=1.2).start()
    rig.serve()
    rig.line.shows(0, 0, 0, 0)
    rig.script.says("WARNING no rest power for 1.2 s: serving 0 W")
    rig.broker.publish("1000")
    rig.line.shows(33, 33, 33, 100)
    rig.line.shows(0, 0, 0, 0)
    rig.script.says("WARNING no rest power for 1.2 s", times=2)
    assert rig.script.log().count("WARNING no rest power") == 2


def test_value_repeated_unchanged_stays_fresh(rig):
    rig = rig(max_age=1).start()
    rig.serve()
    end = time.monotonic() + 1.8
    while time.monotonic() < end:
        rig.broker.publish("3000")
        assert rig.line.power() == (100, 100, 100, 300)
        time.sleep(0.1)


def test_max_age_0_means_no_limit(rig):
    rig = rig(max_age=0).start()
    rig.serve()
    end = time.monotonic() + 1.5
    while time.monotonic() < end:
        assert rig.line.power() == (100, 100, 100, 300)
    assert "WARNING" not in rig.script.log()


def test_old_retained_value_does_not_become_fresh_by_a_reconnect(rig):
    rig = rig(max_age=4)
    with rig.broker.config.open("a") as config:
        config.write(f"persistence true\npersistence_location {rig.folder}/\n")
    rig.start()
    rig.broker.publish("3000", retain=True)
    rig.line.shows(100, 100, 100, 300)
    arrival = time.monotonic()
    rig.broker.process.terminate()  # not killed: so it saves what it retains
    rig.broker.process.wait()
    rig.script.says("closed the connection")
    rig.broker.kill()
    rig.broker.start()
    rig.script.says("rest power 3000 W", times=2)
    assert time.monotonic() - arrival < 3.5
    rig.line.shows(0, 0, 0, 0)
    assert 3.5 < time.monotonic() - arrival < 4.5
    rig.script.says("no rest power for 4 s")
    rig.serve()


def test_log_says_that_an_old_retained_value_is_not_served(rig):
    rig = rig(max_age=0.5)
    rig.broker.start().publish("3000", retain=True)
    rig.start().script.says("no rest power for 0.5 s")
    client = rig.broker.connect()
    client.publish(TOPIC, "3000", retain=True)  # retained, but as it comes it is news
    rig.script.says("rest power 3000 W: 1000 W per phase", times=2)
    rig.script.says("no rest power for 0.5 s", times=2)
    client.disconnect()
    rig.script.process.send_signal(signal.SIGSTOP)  # until the broker gives it up
    eventually(lambda: "exceeded timeout" in rig.broker.log.read_text(), 30)
    rig.script.process.send_signal(signal.SIGCONT)
    rig.script.says("rest power 3000 W again: serving 0 W")
    assert rig.line.power() == (0, 0, 0, 0)


def test_bad_value_is_not_undone_by_what_the_broker_retains(rig):
    rig = rig()
    rig.broker.start().publish("3000", retain=True)
    rig.start().line.shows(100, 100, 100, 300)
    rig.broker.publish("unavailable")
    rig.line.shows(0, 0, 0, 0)
    rig.script.process.send_signal(signal.SIGSTOP)
    eventually(lambda: "exceeded timeout" in rig.broker.log.read_text(), 30)
    rig.script.process.send_signal(signal.SIGCONT)
    rig.script.says("rest power 3000 W again: serving 0 W")
    assert rig.line.power() == (0, 0, 0, 0)


def test_age_counts_the_time_that_the_computer_sleeps(rig):
    rig = rig(max_age=999).start()
    rig.serve()
    (rig.folder / "slept").touch()  # 1000 s, during which monotonic() stands still
    assert rig.line.power() == (0, 0, 0, 0)
    rig.serve()


def test_old_value_is_not_answered_even_if_nothing_else_runs(rig):
    # the task that looks after all, ten times a second, sleeps for ever
    rig = rig(
        max_age=1,
        sabotage="import asyncio\nasyncio.sleep = lambda _: asyncio.Event().wait()",
    )
    rig.start().serve()
    rig.broker.kill()
    rig.line.shows(0, 0, 0, 0)


def test_retained_value_is_taken_at_the_start(rig):
    rig = rig()
    rig.broker.start().publish("3000", retain=True)
    rig.start()
    rig.line.shows(100, 100, 100, 300)


# --------------------------------- The settings ---------------------------------
def test_settings_stand_with_a_comment_each_at_the_top_of_the_script():
    top = SCRIPT[: SCRIPT.index("End of the settings")]
    assert top.count("\n") < 90
    names = [line.split(" = ")[0] for line in DEFAULTS.strip().splitlines()]
    assert re.findall(r"(?m)^([a-z_]+) = .+  # .+$", top) == names


IMPOSSIBLE = {  # for each setting what may stand there, as it is said, and what may not
    "topic": ("topic without + and #", "", "electricity/#", ["a"]),
    "mqtt_server": ("host name", "", "192.168..5", None, "mqtt://192.168.1.5"),
    "mqtt_server ": ("without a port", "192.168.1.5:1883", "[::1]:1883"),
    "mqtt_username": ("a text, or ''", None, 1.5),
    "mqtt_password": ("a text, or ''", None),
    "mqtt_port": ("1 to 65535", 0, 65536, "1883", True),
    "mqtt_tls": ("True or False", "no"),
    "mqtt_ca_file": ("CA file", "/nowhere/ca.crt", __file__),
    "serial_port": ("path", "", 0),
    "baudrate": ("9600", 14400, "19200", 19200.0),
    "baudrate ": ("cannot work in quotes", "19200"),
    "parity": ("'E'", "even"),
    "stopbits": ("1 or 2", 1.5, 3),
    "unit_id": ("1 to 247", 0, 248),
    "surplus_sign": ("1 or -1", 0, -2),
    "max_age": ("seconds", -1, "300", 1 - 1j),
    "log_level": ("INFO", "LOUD"),
    "status_topic": ("topic", TOPIC, "meter/+"),
}


@pytest.mark.parametrize(
    ("name", "value", "allowed"),
    [
        (name.strip(), value, row[0])
        for name, row in IMPOSSIBLE.items()
        for value in row[1:]
    ],
)
def test_setting_that_cannot_work_ends_the_script_with_one_line(
    tmp_path, name, value, allowed
):
    script = Script(tmp_path, **{name: value}).start()
    assert script.process.wait(10) == 2
    (line,) = script.log().splitlines()
    assert line.startswith(f"{name} = {value!r} ")
    assert allowed in line.removeprefix(f"{name} = {value!r}")


@pytest.mark.parametrize("name", ["topic", "baudrate", "log_level"])
def test_setting_that_is_commented_out_is_named(tmp_path, name):
    script = Script(tmp_path)
    text = script.file.read_text().replace(f"\n{name} =", f"\n# {name} =")
    script.file.write_text(text)
    assert script.start().process.wait(10) == 2
    (line,) = script.log().splitlines()
    assert line.startswith(f"{name} is missing, it may be: ")


@pytest.mark.parametrize("server", ["::1", "fe80::1%lo", "broker.local", "10.0.0.5"])
def test_name_and_address_of_a_broker_are_taken(rig, server):
    rig = rig(mqtt_server=server)
    rig.line.plug()
    rig.script.start().says("the meter is on the line")


# ------------------------------- Coming and going -------------------------------
def test_broker_absent_at_the_start_is_waited_for(rig):
    rig = rig()
    rig.line.plug()
    rig.script.start().says("WARNING cannot reach the MQTT broker")
    rig.script.says("the meter is on the line")
    assert rig.line.power() == (0, 0, 0, 0)
    rig.broker.start()
    rig.script.says("connected to the MQTT broker")
    rig.serve()
    assert rig.script.log().count("cannot reach") == 1


def test_name_that_does_not_resolve_is_tried_again(rig):
    rig = rig(mqtt_server="no-such-host.invalid")
    rig.line.plug()
    rig.script.start().says("WARNING cannot reach the MQTT broker no-such-host.invalid")
    rig.script.says("the meter is on the line")
    assert rig.line.power() == (0, 0, 0, 0)
    assert rig.script.process.poll() is None


def test_broker_killed_and_back_serves_the_last_value_then_the_newest(rig):
    rig = rig().start()
    rig.serve()
    rig.broker.kill()
    rig.script.says("closed the connection: connecting again")
    assert rig.line.power() == (100, 100, 100, 300)
    rig.broker.start().publish("1000", retain=True)
    rig.line.shows(33, 33, 33, 100)
    rig.broker.publish("-500")
    rig.line.shows(-17, -17, -17, -50)


def test_last_value_ages_while_the_broker_is_away(rig):
    rig = rig(max_age=1.2).start()
    rig.serve()
    rig.broker.kill()
    assert rig.line.power() == (100, 100, 100, 300)
    rig.line.shows(0, 0, 0, 0)


def test_broker_that_answers_nonsense_does_not_deafen_it_for_good(rig):
    rig = rig()
    rig.line.plug()
    with socket.create_server(("127.0.0.1", rig.broker.port)) as nonsense:
        rig.script.start()
        connection, _ = nonsense.accept()
        connection.recv(1000)
    # "wrong protocol version", and nobody there for the next: paho's thread dies of it
    connection.sendall(b"\x20\x02\x00\x01")
    connection.close()
    rig.script.says("ConnectionRefusedError")
    rig.broker.start()
    rig.script.says("connected to the MQTT broker")
    rig.serve()


def test_adapter_absent_at_the_start_is_waited_for_and_said_once(rig):
    rig = rig()
    rig.broker.start()
    rig.script.start().says("WARNING the adapter")
    rig.script.says("connected to the MQTT broker")
    rig.broker.publish("3000")
    rig.script.says("rest power 3000 W: 1000 W per phase")
    time.sleep(1.5)  # for a second try to open it, which must not be said
    rig.line.plug()
    rig.script.says("the meter is on the line")
    assert rig.line.power() == (100, 100, 100, 300)
    assert rig.script.log().count("is not there") == 1


PASSWORD = "s3cret-17"


def passwords(folder, password=PASSWORD):
    """Return the configuration of a broker with the login heatpump."""
    file = folder / "passwords"
    tool = shutil.which("mosquitto_passwd", path=os.environ["PATH"] + ":/usr/sbin")
    subprocess.run([tool, "-b", "-c", file, "heatpump", password], check=True)
    return {
        "config": f"allow_anonymous false\npassword_file {file}",
        "username": "heatpump",
        "password": password,
    }


def test_password_that_lacks_its_quotes_is_let_in(rig, tmp_path):
    broker = passwords(tmp_path, "4711")
    rig = rig(broker=broker, mqtt_username="heatpump", mqtt_password=4711).start()
    rig.serve()


def test_right_password_is_let_in_and_never_logged(rig, tmp_path):
    login = {"mqtt_username": "heatpump", "mqtt_password": PASSWORD}
    rig = rig(broker=passwords(tmp_path), log_level="DEBUG", **login).start()
    rig.serve()
    assert PASSWORD not in rig.script.log()


def test_wrong_password_is_said_once_and_tried_again(rig, tmp_path):
    login = {"mqtt_username": "heatpump", "mqtt_password": "wr0ng"}
    rig = rig(broker=passwords(tmp_path), **login)
    rig.begin().script.says("ERROR the MQTT broker")
    refused = "not authorised"
    eventually(
        lambda: rig.broker.log.read_text().count(refused) > 2, what="a third try"
    )
    (error,) = re.findall(".*(?:WARNING|ERROR).*", rig.script.log())
    assert "refuses the login, check mqtt_username and mqtt_password: Not auth" in error
    assert "wr0ng" not in rig.script.log()
    assert rig.line.power() == (0, 0, 0, 0)


def test_refused_topic_is_said_once_and_asked_for_again(rig, tmp_path):
    tool = shutil.which("mosquitto_ctrl", path=os.environ["PATH"] + ":/usr/sbin")
    plugin = next(Path("/usr/lib").rglob("mosquitto_dynamic_security.so"))
    rules = tmp_path / "rules.json"
    admin = {"username": "admin", "password": PASSWORD}
    init = [tool, "dynsec", "init", rules, *admin.values()]
    subprocess.run(init, check=True, stdout=subprocess.DEVNULL)
    config = f"allow_anonymous true\nplugin {plugin}\nplugin_opt_config_file {rules}"
    rig = rig(broker={"config": config, **admin})
    rig.begin().script.says("ERROR the MQTT broker")
    asked = "Received SUBSCRIBE from powermeter"
    eventually(lambda: rig.broker.log.read_text().count(asked) >= 3, what="a third try")
    assert (
        rig.script.log().count(
            "refuses topic electricity/hp/restpower to mqtt_username"
        )
        == 1
    )

    rights = ("subscribePattern", "publishClientSend", "publishClientReceive")
    acls = [{"acltype": right, "topic": "#", "allow": True} for right in rights]
    everything = [{"rolename": "everything"}]
    commands = [
        {"command": "createRole", "rolename": "everything", "acls": acls},
        {"command": "createGroup", "groupname": "all", "roles": everything},
        {"command": "setAnonymousGroup", "groupname": "all"},
        {"command": "addClientRole", "username": "admin", **everything[0]},
    ]
    rules = json.dumps({"commands": commands})
    rig.broker.publish(rules, topic="$CONTROL/dynamic-security/v1")
    rig.script.says("connected to the MQTT broker")
    rig.serve()


@pytest.fixture(scope="module")
def certificates(tmp_path_factory):
    """Return a folder with a CA, a certificate of it for localhost, and another CA."""
    folder = tmp_path_factory.mktemp("certificates")
    for name in ("ca", "other"):
        make = f"req -x509 -newkey rsa:2048 -nodes -subj /CN={name} -keyout {name}.key"
        openssl(folder, f"{make} -out {name}.crt")
    openssl(
        folder, "req -newkey rsa:2048 -nodes -subj /CN=broker -keyout b.key -out b.csr"
    )
    (folder / "names").write_text("subjectAltName = DNS:localhost")
    sign = "x509 -req -in b.csr -CA ca.crt -CAkey ca.key -CAcreateserial"
    openssl(folder, f"{sign} -extfile names -out b.crt")
    return folder


def openssl(folder, arguments):
    command = ["openssl", *arguments.split()]
    subprocess.run(command, cwd=folder, check=True, capture_output=True)


def tls_rig(rig, certificates, ca, server):
    config = f"allow_anonymous true\ncertfile {certificates}/b.crt\n"
    config += f"keyfile {certificates}/b.key"
    settings = {"mqtt_tls": True, "mqtt_ca_file": str(certificates / ca)}
    return rig(broker={"config": config}, mqtt_server=server, **settings)


def test_broker_with_a_certificate_of_the_ca_file_is_trusted(rig, certificates):
    rig = tls_rig(rig, certificates, "ca.crt", "localhost").start()
    publisher = mqtt.Client(mqtt.CallbackAPIVersion.VERSION2)
    publisher.tls_set(str(certificates / "ca.crt"))
    publisher.connect("localhost", rig.broker.port)
    publisher.publish(TOPIC, "3000")
    publisher.loop_start()
    rig.line.shows(100, 100, 100, 300)
    publisher.disconnect()
    publisher.loop_stop()


@pytest.mark.parametrize(
    ("ca", "server"), [("other.crt", "localhost"), ("ca.crt", "127.0.0.1")]
)
def test_broker_whose_certificate_does_not_verify_is_refused(
    rig, certificates, ca, server
):
    rig = tls_rig(rig, certificates, ca, server)
    rig.begin().script.says("ERROR cannot reach the MQTT broker")
    rig.script.says("the meter is on the line")
    (error,) = re.findall(".*(?:WARNING|ERROR).*", rig.script.log())
    assert "certificate verify failed" in error
    assert "mqtt_ca_file" in error
    assert "mqtt_server" in error
    assert "connected" not in rig.script.log()
    assert rig.line.power() == (0, 0, 0, 0)


def test_broker_without_tls_is_told_from_a_dead_one(rig, certificates):
    rig = rig(mqtt_tls=True, mqtt_ca_file=str(certificates / "ca.crt"))
    rig.begin().script.says("ERROR cannot reach the MQTT broker")
    (error,) = re.findall(".*ERROR.*", rig.script.log())
    assert "check mqtt_tls" in error


def test_broker_that_wants_tls_is_told_from_a_dead_one(rig, certificates):
    rig = tls_rig(rig, certificates, "ca.crt", "localhost")
    text = rig.script.file.read_text().replace("mqtt_tls = True", "mqtt_tls = False")
    rig.script.file.write_text(text)
    rig.begin().script.says("closed the connection: check mqtt_port and mqtt_tls")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_ctrl_c_and_sigterm_end_it_cleanly(rig, number):
    rig = rig().start()
    rig.line.power()
    status, seconds = rig.script.stop(number)
    assert status == 0
    assert seconds < 2
    assert "Traceback" not in rig.script.log()
    assert "closed" not in rig.script.log()
    left = "Received DISCONNECT from powermeter"
    eventually(lambda: left in rig.broker.log.read_text(), what="the farewell")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_ctrl_c_ends_it_with_neither_broker_nor_adapter(rig, number):
    rig = rig()
    rig.script.start().says("cannot reach the MQTT broker")
    rig.script.says("is not there")
    status, seconds = rig.script.stop(number)
    assert status == 0
    assert seconds < 2
    assert "Traceback" not in rig.script.log()


def test_stopped_terminal_stops_nothing_but_the_log(rig):
    rig = rig(max_age=2)
    rig.broker.start()
    rig.line.plug()
    terminal, end = pty.openpty()  # which nobody reads, as after Ctrl-S
    rig.callback(os.close, terminal)
    rig.script.start(output=end)
    os.close(end)
    eventually(lambda: rig.line.ask(POLL, 0.5), what="an answer")
    client = rig.broker.connect()
    for _ in range(3000):  # over twice what the queue and the terminal hold
        client.publish(TOPIC, "600", qos=1).wait_for_publish(5)
    rig.serve()
    rig.line.pull()
    rig.line.plug()
    eventually(lambda: rig.line.ask(POLL, 0.5), what="an answer after the pull")
    rig.line.shows(0, 0, 0, 0)
    rig.serve()
    client.disconnect()
    status, seconds = rig.script.stop()
    assert (status, seconds < 2) == (0, True)


def test_error_beside_the_server_is_logged_once_and_all_goes_on(rig):
    sabotage = """
from paho.mqtt.client import Client
start = Client.loop_start
def fail(self):
    start(self)
    raise RuntimeError("can't start new thread")
Client.loop_start = fail
"""
    rig = rig(sabotage=sabotage, max_age=1).start()
    rig.serve()
    rig.script.says(
        "ERROR going on after an error: RuntimeError(\"can't start new thread"
    )
    rig.broker.kill()
    rig.line.shows(0, 0, 0, 0)
    status, seconds = rig.script.stop()
    assert (status, seconds < 2) == (0, True)
    assert rig.script.log().count("Traceback") == 1


def test_debug_shows_every_frame_and_info_none(rig):
    loud = rig(log_level="DEBUG").start()
    loud.line.ask(frame("3C 03 00 25 00 01"))
    loud.script.says("recv: 0x3c 0x3 0x0 0x25 0x0 0x1")
    loud.script.says("send: 0x3c 0x3 0x2 0x0 0x0")
    loud.line.send(frame("07 03 00 25 00 01"))
    loud.script.says("recv: 0x7 0x3 0x0 0x25 0x0 0x1")
    quiet = rig().start()
    quiet.line.ask(frame("3C 03 00 25 00 01"))
    quiet.script.stop()
    assert "0x3c" not in quiet.script.log()


# ----------------------------- A shared, noisy line -----------------------------
POLL_7, POLL_9 = frame("07 03 00 25 00 01"), frame("09 03 00 25 00 01")
POLL = frame("3C 03 00 25 00 0E")  # what shows phases and total, 3000 W:
ANSWER = frame(
    "3C 03 1C 00 64 00 00 00 64 00 E6 00 2B 00 64 00 00 00 64"
    "00 E6 00 2B 00 64 00 00 00 64 01 2C"
)


def pack(*numbers):
    """Return a frame of an unit id, a function code and some 16-bit numbers."""
    data = struct.pack(f">BB{len(numbers) - 2}H", *numbers)
    return data + crc(data)


def others(rng):
    return rng.choice([unit for unit in range(1, 248) if unit != 60])


def read_request(rng, unit):
    function, wire, count = rng.randint(1, 4), rng.randrange(65536), rng.randint(1, 125)
    return pack(unit, function, wire, count)


def read_answer(rng, unit):
    values = rng.randbytes(2 * rng.randint(1, 125))
    data = bytes([unit, rng.randint(1, 4), len(values)]) + values
    return data + crc(data)


def write_request(rng, unit):
    values = rng.randbytes(2 * rng.randint(1, 123))
    head = struct.pack(">BBHHB", unit, 16, 29, len(values) // 2, len(values))
    return head + values + crc(head + values)


def unknown_function(rng, unit):
    data = bytes([unit, rng.randint(0x41, 0x7F)]) + rng.randbytes(rng.randint(0, 60))
    return data + crc(data)


FOREIGN = {
    "requests to others": lambda rng: read_request(rng, others(rng)),
    "others' answers": lambda rng: read_answer(rng, others(rng)),
    "requests and answers": lambda rng: (
        read_request(rng, unit := others(rng)) + read_answer(rng, unit)
    ),
    "writes to others": lambda rng: write_request(rng, others(rng)),
    "writes and their answers": lambda rng: (
        write_request(rng, unit := others(rng)) + pack(unit, 16, 29, 2)
    ),
    "single writes to others": lambda rng: pack(
        others(rng), 6, 29, rng.randrange(65536)
    ),
    "others' exceptions": lambda rng: frame(f"{others(rng):02X} 83 02"),
    "unknown functions": lambda rng: unknown_function(rng, others(rng)),
    "broadcasts": lambda rng: rng.choice([read_request, write_request])(rng, 0),
    "noise": lambda rng: rng.randbytes(rng.randint(1, 40)),
    "long noise": lambda rng: rng.randbytes(rng.randint(250, 1200)),
    "more noise than any buffer holds": lambda rng: rng.randbytes(
        rng.randint(4000, 9000)
    ),
    "zeros": lambda rng: bytes(rng.randint(1, 40)),
    "our unit id again and again": lambda rng: b"\x3c" * rng.randint(1, 40),
    "a foreign frame cut off": lambda rng: write_request(rng, others(rng))[
        : rng.randint(1, 60)
    ],
    "our frame cut off": lambda rng: POLL[: rng.randint(1, 7)],
    "our write cut off": lambda rng: write_request(rng, 60)[: rng.randint(1, 10)],
    "our frame with a broken CRC": lambda rng: POLL[:-2] + b"\xff\xff",
    "our answer echoed": lambda rng: ANSWER,
    "our other answers echoed": lambda rng: rng.choice(
        [frame("3C 10 00 1D 00 02"), frame("3C 83 02"), frame("3C 03 02 00 64")]
    ),
    "another's data that look like our request": lambda rng: frame(
        "05 10 00 00 00 04 08" + POLL.hex()
    ),
}


@pytest.mark.parametrize("kind", FOREIGN)
def test_no_poll_is_lost_and_nothing_is_said_to_others_after(meter, kind):
    meter.serve()
    polls = [
        (POLL, ANSWER),
        (frame("3C 10 00 1D 00 02 04 00 00 00 00"), frame("3C 10 00 1D 00 02")),
        (frame("3C 04 00 25 00 01"), frame("3C 84 01")),
    ]
    rng, lost, spoken = random.Random(kind), 0, 0
    for turn in range(60):
        meter.line.send(FOREIGN[kind](rng))
        # every other time the poll follows at once
        spoken += len(meter.line.hear(0.01 if turn % 2 else 0))
        poll, right = polls[turn // 2 % 3]
        answer = meter.line.ask(poll, 0.5)
        lost += not answer.endswith(right)
        spoken += answer != right and answer != b""
    spoken += len(meter.line.hear(0.05))
    assert (lost, spoken) == (0, 0)


def test_poll_is_answered_when_a_stray_byte_follows_it(meter):
    meter.serve()
    rng, lost = random.Random("stray byte"), 0
    for _ in range(200):
        meter.line.send(POLL)
        end = time.monotonic() + rng.uniform(0, 0.0005)
        while time.monotonic() < end:
            pass
        meter.line.send(b"\xff")
        lost += meter.line.answer(0.5) != ANSWER
    assert lost == 0
    assert meter.line.hear(0.05) == b""


def test_poll_that_begins_right_behind_another_is_answered(meter):
    meter.serve()
    for cut in range(1, len(POLL)):
        meter.line.send(frame("3C 03 00 23 00 01") + POLL[:cut])
        first = frame("3C 03 02 00 E6")
        assert meter.line.answer() == first
        assert meter.line.ask(POLL[cut:]) == ANSWER


@pytest.mark.parametrize(
    ("unit", "pieces"),
    [
        # a write to another unit: its data end like a request to us of function 0x41
        (60, ("05 10 00 00 00 02 04" + frame("3C 41").hex(" "), "E6 BB")),
        (3, ("03 03 00 1A 00 0B", "24 28")),  # 03 00 1A 00 0B has a good CRC as well
        (3, ("01 03 00 02 00 01", "25 CA")),
        (1, ("05 03 1C 00 01 00 00 20", "00 00")),
    ],
)
def test_part_of_a_frame_is_never_taken_for_a_request(rig, unit, pieces):
    rig = rig(unit_id=unit).start()
    rig.line.registers(37, 1, unit)
    for _ in range(5):
        rig.line.send(bytes.fromhex(pieces[0]))
        assert rig.line.hear(0.02) == b""
        answer = rig.line.ask(bytes.fromhex(pieces[1]), 0.2)
        assert answer[:2] == (b"\x03\x03" if pieces[0].startswith("03 03") else b"")


def test_poll_is_answered_when_it_comes_in_pieces(meter):
    meter.serve()
    write = frame("3C 10 00 1D 00 02 04 00 00 00 00")
    for request, answer in ((POLL, ANSWER), (write, frame("3C 10 00 1D 00 02"))):
        for cut in range(1, len(request)):
            meter.line.send(request[:cut])
            assert meter.line.hear(0.02) == b""
            assert meter.line.ask(request[cut:]) == answer
    for byte in POLL[:-1]:
        meter.line.send(bytes([byte]))
        assert meter.line.hear(0.02) == b""
    assert meter.line.ask(POLL[-1:]) == ANSWER


def test_of_requests_that_piled_up_only_the_newest_is_answered(meter):
    meter.serve()
    meter.script.process.send_signal(signal.SIGSTOP)
    meter.line.send(frame("3C 03 00 23 00 01") + frame("3C 03 00 32 00 01"))
    meter.script.process.send_signal(signal.SIGCONT)
    assert meter.line.answer() == frame("3C 03 02 01 2C")
    # the master has given us up and asked another
    meter.script.process.send_signal(signal.SIGSTOP)
    meter.line.send(POLL + frame("05 03 00 00 00 01"))
    meter.script.process.send_signal(signal.SIGCONT)
    assert meter.line.hear(0.1) == b""


def test_endless_noise_does_not_slow_the_answer(meter):
    meter.serve()
    rng, begin = random.Random("endless"), time.monotonic()
    for _ in range(200):
        meter.line.send(rng.randbytes(1000))  # waits where the script falls behind
    assert meter.line.ask(POLL, 1.0) == ANSWER
    assert time.monotonic() - begin < 3


def memory(process):
    """Return the resident memory of a process in kB."""
    status = Path(f"/proc/{process.pid}/status").read_text()
    return int(re.search(r"VmRSS:\s+(\d+)", status)[1])


def test_foreign_traffic_makes_neither_memory_nor_log_grow(rig):
    rig, rng = rig().start(), random.Random("a year")
    rig.serve()
    rig.script.says("the heat pump reads the meter")

    def traffic(frames):
        for _ in range(frames):
            rig.line.send(FOREIGN[rng.choice(list(FOREIGN))](rng))
            rig.line.hear(0.0005)
        eventually(lambda: rig.line.ask(POLL).endswith(ANSWER), what="the answer")

    traffic(500)
    before, log = memory(rig.script.process), rig.script.log()
    traffic(3000)
    assert memory(rig.script.process) - before < 500
    assert rig.script.log() == log


# ------------------------------ Adapter and broker ------------------------------
@pytest.mark.parametrize("busy", [False, True], ids=["idle", "busy"])
def test_adapter_pulled_and_plugged_in_again_serves_the_newest_value(rig, busy):
    rig = rig().start()
    rig.serve()
    for turn, watts in enumerate((600, 900), start=1):
        if busy:
            rig.line.send(POLL)
        rig.line.pull()
        rig.script.says("is not there", times=turn)
        rig.broker.publish(str(watts))
        rig.script.says(f"rest power {watts} W")
        rig.line.plug()
        back = time.monotonic()
        rig.script.says("the meter is on the line", times=turn + 1)
        phase = watts // 30
        assert rig.line.power() == (phase, phase, phase, 3 * phase)
        assert time.monotonic() - back < 3
    assert rig.script.log().count("is not there") == 2
    assert rig.script.log().count("the meter is on the line") == 3
    assert "ERROR" not in rig.script.log()
    assert len(re.findall("adapter", rig.script.log())) == 2  # a pull is one line


@pytest.mark.parametrize("first", ["broker", "adapter"])
def test_broker_and_adapter_away_at_once_come_back_in_either_order(rig, first):
    rig = rig().start()
    rig.serve()
    rig.broker.kill()
    rig.line.pull()
    rig.script.says("is not there")
    rig.script.says("cannot reach the MQTT broker")
    if first == "adapter":
        rig.line.plug()
        rig.script.says("the meter is on the line", times=2)
        assert rig.line.power() == (100, 100, 100, 300)
    rig.broker.start().publish("1000", retain=True)
    rig.script.says("rest power 1000 W")
    if first == "broker":
        rig.line.plug()
        rig.script.says("the meter is on the line", times=2)
    assert rig.line.power() == (33, 33, 33, 100)


def test_busy_port_is_said_and_taken_when_it_is_free(rig):
    rig = rig()
    rig.broker.start()
    rig.line.plug()
    with serial.Serial(str(rig.line.port), exclusive=True):
        rig.script.start().says("is in use by another program: trying every second")
    rig.script.says("the meter is on the line")
    assert rig.line.power() == (0, 0, 0, 0)


def test_port_that_is_no_serial_adapter_is_said_in_words(rig):
    rig = rig()
    rig.line.port.write_text("")
    rig.broker.start()
    rig.script.start().says("fails: ")
    assert "((" not in rig.script.log()


def test_missing_permission_is_said_with_its_cure(rig):
    rig = rig()
    rig.broker.start()
    rig.line.plug()
    device = rig.line.port.resolve()
    mode = device.stat().st_mode
    device.chmod(0)
    # root may open everything, unless it gives that up
    meek = ["setpriv", "--bounding-set=-dac_override,-dac_read_search"]
    rig.script.start(*(meek if os.getuid() == 0 else ()))
    rig.script.says("may not be opened, add your user to the group dialout")
    device.chmod(mode)
    rig.script.says("the meter is on the line")
    assert rig.line.power() == (0, 0, 0, 0)


# ------------------------------------- Load -------------------------------------
def test_flood_of_values_tears_no_reading_and_ends_with_the_last(rig):
    rig = rig().start()
    publisher = rig.broker.connect()
    values = [30 * number for number in range(-1000, 1000)]
    stop = threading.Event()

    def flood():
        begin = time.monotonic()
        for number, watts in enumerate(values):
            publisher.publish(TOPIC, str(watts))
            stop.wait(max(0.0, begin + number / 1000 - time.monotonic()))

    thread = threading.Thread(target=flood)
    thread.start()
    readings = []
    while thread.is_alive():
        readings.append(rig.line.power())
    thread.join()
    rig.line.shows(999, 999, 999, 2997)
    assert len(set(readings)) > 100
    assert [
        power for power in readings if power != (power[0],) * 3 + (3 * power[0],)
    ] == []
    publisher.disconnect()
    publisher.loop_stop()


# --------------------------- The ALE3, register by register ---------------------------
REGISTERS = [  # the first R, the datasheet's names, values for 6900 W, others for -6900 W
    (1, "firmware version, number of registers, of flags", (11, 52, 0)),
    (4, "baudrate, high and low word", (1, 49664)),  # 115200 = 65536 + 49664
    (6, "not used", (0,)),
    (7, "type: AL E3 D5 FD", (0x414C, 0x4533, 0x4435, 0x4644)),
    (11, "type: 10 C2 A0 0", (0x3130, 0x4332, 0x4130, 0x3000)),
    (15, "hardware version", (11,)),
    (16, "serial number", (0, 0, 1)),
    (19, "not used", (0, 0, 0)),
    (22, "status, response timeout, Modbus address", (0, 60, 17)),
    (25, "error, not used, tariff", (0, 0, 0)),
    (28, "energy total and partial, tariff 1", (0, 0, 0, 0)),
    (32, "energy total and partial, tariff 2", (0, 0, 0, 0)),
    (36, "voltage, current", (230, 100)),
    (38, "active power of phase 1", (230,), (65306,)),
    (39, "reactive power, cos phi, voltage, current", (0, 100, 230, 100)),
    (43, "active power of phase 2", (230,), (65306,)),
    (44, "reactive power, cos phi, voltage, current", (0, 100, 230, 100)),
    (48, "active power of phase 3", (230,), (65306,)),
    (49, "reactive power, cos phi", (0, 100)),
    (51, "active power, total", (690,), (64846,)),
    (52, "reactive power, total", (0,)),
]


@pytest.mark.parametrize(("watts", "column"), [("6900", 2), ("-6900", 3)])
def test_each_register_is_that_of_the_datasheet(rig, watts, column):
    rig = rig(baudrate=115200, unit_id=17)
    rig.line.speaks = (115200, "E")
    rig.start().broker.publish(watts)
    rig.script.says(f"rest power {watts} W")
    read = [rig.line.registers(wire, 1, 17)[0] & 0xFFFF for wire in range(52)]
    expected = [row[column] if column < len(row) else row[2] for row in REGISTERS]
    assert read == [value for values in expected for value in values]


OTHER_FUNCTIONS = """
01 00 25 00 01 | 02 00 25 00 01 | 04 00 25 00 01 | 05 00 25 FF 00
06 00 25 12 34 | 07 | 08 00 00 A5 37 | 08 00 04 00 00 | 0B | 0C
0F 00 25 00 08 01 FF | 11 | 14 07 06 00 04 00 01 00 02
15 09 06 00 04 00 07 00 01 12 34 | 16 00 25 00 F2 00 25
17 00 25 00 01 00 25 00 01 02 12 34 | 18 00 25 | 2B 0E 01 00 | 41
65 01 02 03 04 05 06 07 08 09 | 7F 00
"""  # each of its usual size, refused by its own code with exception 1
PHASE_3000 = "00 E6 00 2B 00 64 00 00 00 64"  # 230 V, 4.3 A, 1000 W, 0 var, cos phi 1
REPLIES = {  # the request, and the reply at 3000 W; both get their CRC
    "a phase": ("3C 03 00 25 00 01", "3C 03 02 00 64"),
    "type": (
        "3C 03 00 06 00 08",
        "3C 03 10 41 4C 45 33 44 35 46 44 31 30 43 32 41 30 30 00",
    ),
    "baudrate and address": ("3C 03 00 03 00 02", "3C 03 04 00 00 4B 00"),
    "the last register": ("3C 03 00 33 00 01", "3C 03 02 00 00"),
    "20 registers": (
        "3C 03 00 20 00 14",
        f"3C 03 28 00 00 00 00 00 00 {PHASE_3000} {PHASE_3000} {PHASE_3000} 01 2C 00 00",
    ),
    "21 registers": ("3C 03 00 00 00 15", "3C 83 02"),
    "126 registers": ("3C 03 00 00 00 7E", "3C 83 02"),
    "65535 registers": ("3C 03 00 00 FF FF", "3C 83 02"),
    "no register": ("3C 03 00 25 00 00", "3C 83 02"),
    "behind the map": ("3C 03 00 34 00 01", "3C 83 02"),
    "across the map's end": ("3C 03 00 33 00 02", "3C 83 02"),
    "far outside": ("3C 03 FF FF 00 01", "3C 83 02"),
    "reset partial 1": ("3C 10 00 1D 00 02 04 00 00 00 00", "3C 10 00 1D 00 02"),
    "reset partial 2": ("3C 10 00 21 00 02 04 00 00 00 00", "3C 10 00 21 00 02"),
    "set partial 1": ("3C 10 00 1D 00 02 04 00 00 00 01", "3C 90 03"),
    "set partial 2": ("3C 10 00 21 00 02 04 12 34 00 00", "3C 90 03"),
    "half a counter": ("3C 10 00 1D 00 01 02 00 00", "3C 90 02"),
    "total counter": ("3C 10 00 1B 00 02 04 00 00 00 00", "3C 90 02"),
    "both counters": ("3C 10 00 1B 00 04 08 00 00 00 00 00 00 00 00", "3C 90 02"),
    "a value": ("3C 10 00 25 00 01 02 12 34", "3C 90 02"),
    "the address": ("3C 10 00 17 00 01 02 00 05", "3C 90 02"),
    "write behind the map": ("3C 10 00 34 00 01 02 00 00", "3C 90 02"),
    "too few bytes": ("3C 10 00 1D 00 02 02 00 00", "3C 90 03"),
    "too many bytes": ("3C 10 00 1D 00 02 06 00 00 00 00 00 00", "3C 90 03"),
    "fewer bytes than said": ("3C 10 00 1D 00 02 04 00 00", "3C 90 03"),
    "more bytes than said": ("3C 10 00 1D 00 02 04 00 00 00 00 00 00", "3C 90 03"),
    "a write cut short": ("3C 10 00 1D", "3C 90 03"),
    "a write cut shorter": ("3C 10", "3C 90 03"),
    "a write without data": ("3C 10 00 1D 00 02 04", "3C 90 03"),
    "a write of nothing": ("3C 10 00 1D 00 00 00", "3C 90 03"),
}
for request in re.split(r"[|\n]", OTHER_FUNCTIONS.strip()):
    code = int(request.strip()[:2], 16)
    REPLIES[f"function {request}"] = (f"3C {request}", f"3C {code | 0x80:02X} 01")


@pytest.mark.parametrize(("request_", "reply"), REPLIES.values(), ids=REPLIES)
def test_meter_replies_as_the_datasheet_says(meter, request_, reply):
    meter.serve()
    before = [meter.line.registers(wire, 13) for wire in (0, 13, 26, 39)]
    answer = meter.line.ask(frame(request_), 1.0 if reply else 0.1)
    assert answer == (frame(reply) if reply else b"")
    assert [meter.line.registers(wire, 13) for wire in (0, 13, 26, 39)] == before
    assert meter.line.hear(0) == b""


@pytest.fixture(scope="module")
def script(tmp_path_factory):
    """Return the script as a module, with the default settings."""
    file = Script(tmp_path_factory.mktemp("module")).file
    spec = importlib.util.spec_from_file_location("powermeter", file)
    spec.loader.exec_module(module := importlib.util.module_from_spec(spec))
    return module


@pytest.mark.parametrize(("request_", "reply"), REPLIES.values(), ids=REPLIES)
def test_refusals_are_those_of_the_datasheet(script, request_, reply):
    answer = bytes.fromhex(reply)
    code = script.refusal(bytes.fromhex(request_)[1:])
    assert code == (answer[2] if answer[1] > 0x80 else None)


FRAMES = {  # what came: frames in brackets get their CRC, and "?" is a request
    "a request and its answer": "[07 03 00 25 00 01]? [07 03 02 00 00]",
    "other reads": "[07 01 00 25 00 01]? [07 02 01 FF] [07 04 02 00 00]",
    "single writes, whose answers look the same": "[07 05 00 25 FF 00]? [07 06 00 25 00 01]?",
    "a write and its answer": "[07 10 00 1D 00 01 02 00 00]? [07 10 00 1D 00 01]",
    "an exception": "[07 83 02]",
    "noise around": "FF 00 [3C 03 00 25 00 01]? 3C 03 [07 83 02] FF",
    "cut off": "3C 03 00 25 00",
    "a broken CRC": "3C 03 00 25 00 01 00 00",
    "ours of unknown size": "[3C 41 01 02 03]?",
    "ours of unknown size behind another": "[07 83 02] [3C 41 01 02 03]?",
    "ours of unknown size behind noise": "FF 3C 41 11 F0",
    "another's of unknown size": "07 41 C2 00",
    "our own answer": "[3C 03 02 00 64]",
    "our write cut short": "[3C 10 00 1D]?",
}


@pytest.mark.parametrize("text", FRAMES.values(), ids=FRAMES)
def test_frames_are_found_in_all_that_comes(script, text):
    data, expected = b"", []
    for frame_, mark, noise in re.findall(r"\[(.*?)\](\??)|([^\[]+)", text):
        data += frame(frame_) if frame_ else bytes.fromhex(noise)
        expected += [(frame(frame_), mark == "?")] if frame_ else []
    assert script.find_frames(data)[0] == expected


@pytest.mark.parametrize("code", sorted(set(range(1, 128)) - {3, 16}))
def test_every_other_function_is_refused_by_its_own_code(meter, code):
    request = frame(f"3C {code:02X} 00 25 00 01")
    assert meter.line.ask(request) == frame(f"3C {code | 0x80:02X} 01")


def test_broadcast_is_not_answered_and_changes_nothing(meter):
    meter.serve()
    meter.line.send(frame("00 10 00 25 00 01 02 12 34"))
    assert meter.line.hear(0.05) == b""
    meter.line.send(frame("00 03 00 25 00 01"))
    assert meter.line.hear(0.05) == b""
    assert meter.line.power() == (100, 100, 100, 300)


# ------------------------- The heat pump's serial settings -------------------------
class Searching:
    """A rig with little patience, whose heat pump has other serial settings."""

    def __init__(self, rig, *speaks, patience=0.5):
        self.rig = rig(PATIENCE=patience)
        self.rig.line.speaks = speaks
        self.rig.start()
        self.line, self.script = self.rig.line, self.rig.script

    def find(self, seconds=30):
        """Poll until the first answer; nothing else may be said."""
        end = time.monotonic() + seconds
        while not (answer := self.line.ask(POLL, 0.4)):
            assert time.monotonic() < end, f"still at {self.line.settings()}"
        assert answer[:3] == b"\x3c\x03\x1c"
        assert self.line.settings() == self.line.speaks

    def noise(self, seconds):
        """Send rubbish in pieces, and return the serial settings seen meanwhile."""
        seen, end = [], time.monotonic() + seconds
        while time.monotonic() < end:
            os.write(self.line.ends[0], b"\x55\xaa\x55")
            assert self.line.hear(0.15) == b""
            seen.append(self.line.settings())
        return seen


@pytest.mark.parametrize(
    "speaks", [(38400, "N"), (19200, "O"), (9600, "E"), (115200, "N"), (1200, "O")]
)
def test_serial_settings_of_the_heat_pump_are_found_and_said_once(rig, speaks):
    searching = Searching(rig, *speaks)
    searching.find()
    rate, letter = speaks
    searching.script.says(
        f"INFO the heat pump speaks {rate} bit/s 8{letter}1: "
        f'set baudrate = {rate}, parity = "{letter}", stopbits = 1\n'
    )
    high, low = searching.line.registers(3, 2)
    assert high << 16 | low & 0xFFFF == rate
    searching.rig.serve()
    assert searching.script.log().count("the heat pump speaks") == 1
    assert searching.script.log().count("the meter is on the line") == 1


def test_two_stop_bits_of_the_settings_are_tried_again_in_each_round(rig):
    rig = rig(stopbits=2, parity="N", PATIENCE=0.3)
    rig.line.speaks = (19200, "N")
    rig.start()
    os.write(rig.line.ends[0], b"noise")
    assert termios.tcgetattr(rig.line.ends[0])[2] & termios.CSTOPB
    eventually(lambda: rig.line.ask(POLL, 0.4), what="an answer")
    assert "the heat pump speaks" not in rig.script.log()


def test_round_without_success_is_said_once_and_a_late_heat_pump_found(rig):
    searching = Searching(rig, 19200, "E")
    seen = []
    while searching.script.log().count("no serial settings fit: swap A and B") == 0:
        seen += searching.noise(1)
    seen += searching.noise(10)  # another round
    assert set(seen) == {(r, p) for r in SPEEDS for p in "ENO"}
    assert seen.count((19200, "E")) == max(map(seen.count, seen))
    assert searching.script.log().count("WARNING") == 1
    searching.find()
    assert "the heat pump speaks" not in searching.script.log()


def test_silence_moves_no_serial_setting(rig):
    searching = Searching(rig, 57600, "N")
    time.sleep(1)  # with nothing heard, for a move that must not come
    assert searching.line.settings() == (19200, "E")
    while searching.line.settings() == (19200, "E"):
        searching.noise(0.2)
    before = searching.line.settings()
    time.sleep(1)  # the same during the search
    assert searching.line.settings() == before
    searching.find()


PROOFS = {  # frames, and whether they prove the serial settings, so that noise moves nothing
    "a request to us": (POLL, True),
    "a request to others and its answer": (POLL_7 + frame("07 03 02 00 00"), True),
    "one good frame, which may be chance": (POLL_7, False),
    "exceptions, which chance makes easily": (2 * frame("07 83 02"), False),
}


@pytest.mark.parametrize(("frames", "are_proof"), PROOFS.values(), ids=PROOFS)
def test_two_good_frames_or_a_request_to_us_prove_the_serial_settings(
    rig, frames, are_proof
):
    searching = Searching(rig, 19200, "E")
    searching.line.ask(frames, 0.2)
    seen = searching.noise(3)
    assert (set(seen) == {(19200, "E")}) == are_proof
    searching.find()


def test_frames_in_pieces_fit(rig):
    searching = Searching(rig, 9600, "N")
    searching.find()
    searching = Searching(rig, 19200, "E")
    end = time.monotonic() + 2
    while time.monotonic() < end:
        searching.line.send(POLL_9[:3])
        time.sleep(0.06)
        searching.line.send(POLL_9[3:])
        assert searching.line.hear(0.2) == b""
        assert searching.line.settings() == (19200, "E")


def test_beginning_in_the_midst_of_a_frame_is_not_held_against_the_settings(rig):
    searching = Searching(rig, 19200, "N")
    while searching.line.settings() != (19200, "N"):
        searching.noise(0.01)
    os.write(searching.line.ends[0], POLL[3:])  # its first half went to the try before
    time.sleep(0.3)
    assert searching.line.settings() == (19200, "N")
    assert searching.line.ask(POLL)[:3] == b"\x3c\x03\x1c"


def test_adapter_pulled_during_the_search_goes_on_with_it(rig):
    searching = Searching(rig, 38400, "N")
    while searching.line.settings() == (19200, "E"):
        searching.line.ask(POLL, 0.2)
    searching.line.pull()
    searching.script.says("is not there: trying every second")
    searching.rig.broker.publish("3000")
    searching.line.plug()
    searching.script.says("the meter is on the line", times=2)
    searching.find()
    assert searching.line.power() == (100, 100, 100, 300)
    assert "never retrieved" not in searching.script.log()


def test_ctrl_c_ends_the_search(rig):
    searching = Searching(rig, 38400, "N")
    while searching.line.settings() == (19200, "E"):
        searching.line.ask(POLL, 0.2)
    status, seconds = searching.script.stop(signal.SIGINT)
    assert (status, seconds < 2) == (0, True)
    assert "Traceback" not in searching.script.log()


def test_kernel_is_told_to_check_the_parity(meter):
    # without it a real adapter passes odd parity for even, and the search ends wrongly
    assert termios.tcgetattr(meter.line.ends[0])[0] & termios.INPCK


# ----------------------------- Knowing what is going on -----------------------------
def test_log_says_when_the_heat_pump_starts_and_stops_to_read(rig):
    rig = rig(READ_TIMEOUT=0.8).start()
    for turn in (1, 2):
        rig.line.ask(POLL)
        rig.script.says("INFO the heat pump reads the meter, unit 60", times=turn)
        rig.script.says("WARNING the heat pump has not read for 0.8 s", times=turn)
    assert rig.script.log().count("has not read") == 2


SILENCES = {  # what comes on the line meanwhile, and the diagnosis
    "nothing": (b"", "nothing came: check wires A and B, adapter, the"),
    "no frame": (
        bytes(range(40)),
        "no frame fits: trying other serial settings; swap A",
    ),
    "a broken CRC": (POLL[:-1] + b"\0", "no frame fits: trying other serial settings"),
    "a silent unit": (POLL_9, "asked in vain: set unit_id = 9$"),
    "two silent units": (POLL_9 + frame("21 04 00 00 00 02"), "set unit_id = 9 or 33$"),
    "a neighbour that answers": (
        POLL_7 + frame("07 03 02 00 00") + POLL_9,
        "set unit_id = 9$",
    ),
    "only neighbours that answer": (
        POLL_7
        + frame("07 83 02")
        + frame("08 04 00 00 00 01")
        + frame("08 04 02 00 00"),
        "it does not ask for a meter: switch it on in its settings",
    ),
    "writes of one, which are answered by the same": (
        2 * frame("07 06 00 25 00 01") + 2 * frame("08 05 00 25 FF 00"),
        "it does not ask for a meter",
    ),
    "short answers that look like requests": (
        frame("07 01 00 00 00 18") + frame("07 01 03 00 00 18"),
        "it does not ask for a meter",
    ),
    "broadcasts": (2 * frame("00 03 00 00 00 02"), "it does not ask for a meter"),
    "another function": (frame("3C 04 00 25 00 01"), "refuses what it asks: 04 00 25"),
}


@pytest.mark.parametrize(("heard", "diagnosis"), SILENCES.values(), ids=SILENCES)
def test_silence_from_the_start_is_diagnosed_once(rig, heard, diagnosis):
    rig = rig(READ_TIMEOUT=0.6, status_topic=STATUS).start()
    if heard:
        rig.line.send(heard)
    rig.script.says("has not read for 0.6 s")
    time.sleep(0.8)  # for a second warning, which must not come
    (warning,) = re.findall(".*WARNING.*", rig.script.log())
    assert re.search(diagnosis, warning)
    assert "reads the meter" not in rig.script.log()


@pytest.mark.parametrize("heard", [b"", b"\0", ANSWER, POLL_9])
def test_heat_pump_that_read_once_has_stopped_asking(rig, heard):
    rig = rig(READ_TIMEOUT=1).start()
    rig.line.ask(POLL)
    rig.line.send(heard)
    rig.script.says("has not read for 1 s: it stopped asking: is it on, are all wires")


def test_while_the_adapter_is_missing_nothing_else_is_asked_for(rig):
    rig = rig(READ_TIMEOUT=0.5)
    rig.broker.start()
    rig.script.start().says("is not there")
    time.sleep(1.5)  # for a diagnosis, which must not come
    assert "has not read" not in rig.script.log()
    rig.line.plug()
    rig.script.says("nothing came: check wires A and B")


def test_value_is_logged_as_a_sentence_with_its_unit(meter):
    meter.broker.publish("3000")
    meter.script.says("INFO rest power 3000 W: 1000 W per phase")
    meter.broker.publish("-1234.5")
    meter.script.says("INFO rest power -1234.5 W: -412 W per phase")


@pytest.fixture
def watched(rig):
    """Return a rig with a status topic, and the words that were seen on it."""
    rig, words = rig(status_topic=STATUS, READ_TIMEOUT=2), []
    rig.broker.start()

    def watcher():
        client = rig.broker.connect()
        client.on_message = lambda _client, _data, message: words.append(
            (message.payload.decode(), message.retain)
        )
        client.subscribe(STATUS)
        rig.callback(client.loop_stop)
        rig.callback(client.disconnect)

    watcher()
    return rig, words, watcher


def seen(words, *expected):
    """Wait until exactly these words came, each within the 5 s that are promised."""
    for number, word in enumerate(expected, start=1):
        eventually(lambda: len(words) >= number, 5, what=word)  # noqa: B023
        assert words[number - 1][0] == word


def test_status_follows_the_heat_pump_and_the_script(watched):
    rig, words, watcher = watched
    rig.start()
    seen(words, "no heat pump")
    rig.line.ask(POLL)
    seen(words, "no heat pump", "online", "no heat pump")
    rig.line.ask(POLL)
    seen(words, "no heat pump", "online", "no heat pump", "online")
    watcher()
    seen(words, "no heat pump", "online", "no heat pump", "online", "online")
    assert words[-1] == ("online", True)  # retained
    words.clear()
    rig.line.send(POLL)
    rig.script.stop()
    seen(words, "offline")
    eventually(lambda: len(words) == 2, what="offline for both watchers")
    watcher()
    eventually(lambda: words[2:] == [("offline", True)], what="the retained offline")


def test_status_is_offline_by_the_brokers_will_when_the_script_dies(watched):
    rig, words, watcher = watched
    rig.start()
    seen(words, "no heat pump")
    rig.line.ask(POLL)
    seen(words, "no heat pump", "online")
    rig.script.kill()
    seen(words, "no heat pump", "online", "offline")
    words.clear()
    watcher()
    seen(words, "offline")
    assert words == [("offline", True)]


def test_status_is_published_again_after_a_reconnect(watched):
    rig, words, watcher = watched
    rig.start()
    seen(words, "no heat pump")
    rig.broker.kill()
    rig.script.says("cannot reach the MQTT broker")
    rig.broker.start()
    words.clear()
    rig.script.says("connected to the MQTT broker", times=2)
    watcher()
    seen(words, "no heat pump")


def test_no_status_is_published_without_a_topic_for_it(rig):
    rig = rig().start()
    rig.line.ask(POLL)
    rig.script.says("the heat pump reads")
    rig.script.stop()
    assert "Received PUBLISH from powermeter" not in rig.broker.log.read_text()


# ------------------------------ The sunny day, the README ------------------------------
def day_in(folder, seconds, *prefix):
    """Start the sunny day as its user does, of a copy with another length."""
    shutil.copy(HERE / "powermeter.py", folder)
    text = (HERE / "test_powermeter.py").read_text()
    text, found = re.subn(r"(?m)^DAY = .*$", f"DAY = {seconds}", text)
    assert found == 1
    (folder / "test_powermeter.py").write_text(text)
    (folder / "tmp").mkdir()
    return subprocess.Popen(
        [*prefix, sys.executable, "test_powermeter.py"],
        cwd=folder,
        env={
            **os.environ,
            "TMPDIR": str(folder / "tmp"),
            "PYTHONDONTWRITEBYTECODE": "1",
        },
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def assert_nothing_stayed_behind(folder):
    left = {str(path.relative_to(folder)) for path in folder.rglob("*")}
    assert left == {"powermeter.py", "test_powermeter.py", "tmp"}
    for process in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):
            assert str(folder) not in process.read_text()


def test_sunny_day_ends_by_itself_and_leaves_nothing_behind(tmp_path):
    day = day_in(tmp_path, 2.5)
    output, _ = day.communicate(timeout=30)
    assert day.returncode == 0, output
    rows = re.findall(
        r"(?m)^ (\d\d:\d\d) +(-?\d+\.\d\d) +\2 +\2 +(-?\d+\.\d\d) .*$", output
    )
    assert len(rows) >= 2
    totals = [float(row[2]) for row in rows]
    assert totals[0] < 0 < max(totals)
    assert totals[-1] < 0
    assert all(abs(3 * float(row[1]) - float(row[2])) < 0.03 for row in rows)
    assert_nothing_stayed_behind(tmp_path)


# as a shell script starts what it puts into the background
IGNORING_CTRL_C = ("sh", "-c", 'trap "" INT; exec "$@"', "sh")


@pytest.mark.parametrize(
    ("prefix", "number"),
    [
        (("env", "--default-signal=INT"), signal.SIGINT),
        ((), signal.SIGTERM),
        ((), signal.SIGHUP),
        (IGNORING_CTRL_C, signal.SIGTERM),
    ],
)
def test_sunny_day_leaves_nothing_behind_when_it_is_ended(tmp_path, prefix, number):
    day = day_in(tmp_path, 30, *prefix)
    for line in day.stdout:
        if re.match(r" \d\d:\d\d", line):
            break
    day.send_signal(number)
    output, _ = day.communicate(timeout=10)
    assert day.returncode == 0
    assert "Traceback" not in output
    assert_nothing_stayed_behind(tmp_path)


# ------------------------------------ The sunny day ------------------------------------
DAY = 30  # s that the day from 6 to 21 o'clock takes


def rest_power(minute, rng):
    """Return the rest power in W at a minute of a sunny day with clouds."""
    sun = max(0.0, sin((minute - 390) / 840 * pi)) ** 1.5 * 8000
    cloud = 0.35 + 0.65 * abs(sin(minute / 47)) if 600 < minute < 1020 else 1.0
    house = 450 + 250 * abs(sin(minute / 23)) + rng.uniform(-60, 60)
    return round(sun * cloud - house)


def play_day():
    """Publish the day's rest power minute by minute, and print what the meter shows."""
    rng, last_ten, begin, printed = random.Random("sun"), deque(maxlen=10), None, 0.0
    minutes = range(6 * 60, 21 * 60)
    with Rig() as rig:
        rig.start()
        print(" time    phase 1  phase 2  phase 3    total  balanced  in kW")
        begin = time.monotonic()
        for number, minute in enumerate(minutes):
            rig.broker.publish(str(rest_power(minute, rng)))
            if not number:
                rig.script.says("rest power")  # so that the day begins with a value
            time.sleep(max(0, begin + number * DAY / len(minutes) - time.monotonic()))
            power = [value / 100 for value in rig.line.power()]
            last_ten.append(power[3])
            balanced = sum(last_ten) / len(last_ten)
            if time.monotonic() - printed >= 1 or minute == minutes[-1]:
                printed = time.monotonic()
                left = "#" * min(8, round(-power[3] * 4))
                right = "#" * round(power[3] * 4)
                numbers = "  ".join(f"{value:7.2f}" for value in (*power, balanced))
                bar = f"{left:>8}|{right}"
                print(
                    f" {minute // 60:02}:{minute % 60:02}  {numbers}  {bar}", flush=True
                )


if __name__ == "__main__":
    # Whatever ends the day early, also a closed terminal, the rig takes itself down.
    for end in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(end, lambda *_: sys.exit(0))
    with contextlib.suppress(KeyboardInterrupt):
        play_day()
