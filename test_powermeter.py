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
topic = "electricity/hp/restpower" | mqtt_server = "localhost" | mqtt_port = 1883
mqtt_username = "" | mqtt_password = "" | mqtt_tls = False | mqtt_ca_file = ""
max_age = 300 | status_topic = "" | serial_port = "/dev/ttyUSB0" | baudrate = 19200
parity = "E" | stopbits = 1 | unit_id = 60 | surplus_sign = 1 | log_level = "INFO"
"""
DEFAULTS = dict(re.findall(r"(\w+) = (\S+)", DEFAULTS))
PASSWORD = "s3cret-17"
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


def frame(data):
    """Return the RTU frame for bytes, which may be written in hex, with its CRC."""
    data = bytes.fromhex(data) if isinstance(data, str) else data
    return data + crc(data)


def bytes_of(text):
    """Return bytes written in hex, among them frames in brackets, which get their CRC."""
    return bytes.fromhex(re.sub(r"\[(.*?)\]\??", lambda it: frame(it[1]).hex(), text))


def table(text):
    """Return {name: (left, right)} for rows of 'name: left | name: left -> right'."""
    cases = {}  # an indented line goes on with a row
    for row in re.split(r"\n(?! )", text.strip()):
        lefts, right = row.split("->")
        for left in lefts.split("|"):
            name, left = left.split(":")
            cases[name.strip()] = (left.strip(), right.strip())
    return cases


def eventually(condition, seconds=10.0, what="the condition"):
    """Wait until condition() is true and return its value; fail after some seconds."""
    end = time.monotonic() + seconds
    while not (value := condition()):
        assert time.monotonic() < end, f"waited {seconds} s in vain for {what}"
        time.sleep(0.005)
    return value


class Program:
    """A process, and its log: all that it says."""

    def __init__(self, output):
        self.output, self.process = output, None

    def run(self, *command, output=None, **more):
        with self.output.open("a") as log:
            more |= {"stdout": output or log, "stderr": subprocess.STDOUT}
            self.process = subprocess.Popen(command, start_new_session=True, **more)

    def log(self):
        return self.output.read_text()

    def says(self, *texts, times=1, seconds=10.0):
        """Wait until each text stands in the log, as often as it is asked for."""
        for text in texts:
            what = f"{times} times {text!r} in the log"
            eventually(lambda: self.log().count(text) >= times, seconds, what)  # noqa: B023

    def kill(self, number=signal.SIGKILL):
        if self.process:
            self.process.send_signal(number)
            self.process.wait(10)
            self.process = None


class Broker(Program):
    """A mosquitto on a free port, and clients of our own, which end before it does."""

    def __init__(self, folder, config="allow_anonymous true", ca=None, **login):
        super().__init__(folder / "mosquitto.log")
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        self.config = folder / "mosquitto.conf"
        self.config.write_text(f"user root\nlistener {self.port} 127.0.0.1\n{config}\n")
        self.ca, self.login, self.clients = ca, login, []

    def start(self):
        if not MOSQUITTO:
            sys.exit(NO_MOSQUITTO)
        if not self.process:
            self.run(MOSQUITTO, "-v", "-c", self.config)
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
        if self.ca:
            client.tls_set(self.ca)
        client.connect("localhost", self.port)
        client.loop_start()
        self.clients.append(client)
        eventually(client.is_connected, what="the publisher's login")
        return client

    def watch(self, words):
        """Note what comes on the status topic, and whether it was retained."""
        client = self.connect()
        client.on_message = lambda _client, _data, message: words.append(
            (message.payload.decode(), message.retain)
        )
        client.subscribe(STATUS)

    def publish(self, payload, topic=TOPIC, retain=False):
        client = self.clients[0] if self.clients else self.connect()
        client.publish(topic, payload, qos=1, retain=retain).wait_for_publish(5)

    def kill(self, number=signal.SIGKILL):
        while self.clients:
            client = self.clients.pop()
            client.disconnect()
            client.loop_stop()
        super().kill(number)


SPEEDS = (1200, 2400, 4800, 9600, 19200, 38400, 57600, 115200)
# A pseudo line has no parity: run before the script, this adds it, sleep and sabotage.
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
    slept = os.path.getsize(FOLDER + "/slept") if number == time.CLOCK_BOOTTIME else 0
    return clock(number) + slept
termios.tcgetattr, termios.tcsetattr = tcgetattr, tcsetattr
time.clock_gettime = clock_gettime
exec(os.environ["SABOTAGE"])
"""
# Sabotages: it says when it looks after all; the line refuses parity, as some adapters.
LOOKS = "from paho.mqtt.client import Client\nstart = Client.loop_start\n"
LOOKS += 'Client.loop_start = lambda it: print("looked", flush=True) or start(it)'
NO_PARITY = "termios.tcgetattr, termios.tcsetattr = get, set_"


class Line:
    """A serial line: the adapter's end for the script, the heat pump's end for us.

    What one end sends is rubbish to the other unless both have the same speed and parity.
    """

    def __init__(self, folder, speaks):
        self.folder, self.port, self.ends = folder, folder / "ttyUSB0", ()
        self.speaks = speaks  # at the heat pump's end

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

    def ask(self, request, seconds=3.0):
        """Send a request and return all that comes until it is a whole frame."""
        self.send(request)
        return self.answer(seconds)

    def answer(self, seconds=3.0):
        data, end = b"", time.monotonic() + seconds
        while (left := end - time.monotonic()) > 0:
            data += self.hear(left)
            if len(data) > 4 and crc(data) == b"\0\0":
                break
        return data

    def registers(self, wire, count, unit=60):
        """Read some registers and return them as signed numbers."""
        data = self.ask(frame(struct.pack(">BBHH", unit, 3, wire, count)))
        assert len(data) == 5 + 2 * count, f"read {wire}, {count}: got {data.hex(' ')}"
        return struct.unpack(f">{count}h", data[3:-2])

    def power(self, unit=60):
        """Return the three phases and the total, in 10 W, as one read shows them."""
        values = self.registers(37, 14, unit)
        return values[0], values[5], values[10], values[13]

    def shows(self, *power):
        eventually(lambda: self.power() == power, what=f"{power} on the line")

    def find(self):
        """Poll until the first answer; nothing else may be said."""
        answer = eventually(lambda: self.ask(POLL, 0.4), 60, f"{self.speaks}")
        assert answer[:3] == b"\x3c\x03\x1c" and self.settings() == self.speaks

    def noise(self, seconds):
        """Send rubbish in pieces, and return the serial settings seen meanwhile."""
        seen, end = [], time.monotonic() + seconds
        while time.monotonic() < end:
            os.write(self.ends[0], b"\x55\xaa\x55")
            assert self.hear(0.15) == b""
            seen.append(self.settings())
        return seen


class Script(Program):
    """powermeter.py as a process of a copy with edited settings."""

    def __init__(self, folder, sabotage="", **settings):
        super().__init__(folder / "powermeter.log")
        text, changed = SCRIPT, {name: repr(value) for name, value in settings.items()}
        for name, value in {**DEFAULTS, **changed}.items():
            line = f"{name} = {value}"
            text, found = re.subn(rf"(?m)^{name} = .*$", lambda _: line, text)  # noqa: B023
            assert found == 1, f"{found} lines set {name}"
        self.file = folder / "powermeter.py"
        self.file.write_text(text)
        (folder / "sitecustomize.py").write_text(SITE)
        self.slept = folder / "slept"  # as many bytes as seconds, see sleeps()
        self.slept.touch()
        rig = {"RIG": str(folder), "PYTHONPATH": str(folder), "SABOTAGE": sabotage}
        self.environment = {**os.environ, **rig}

    def start(self, *prefix, **more):
        self.run(*prefix, sys.executable, self.file, env=self.environment, **more)
        return self

    def sleeps(self, seconds):
        """Let the computer sleep: its boot time goes on, monotonic() stands still."""
        with self.slept.open("ab") as slept:
            slept.write(bytes(seconds))

    def looks(self, times):
        """Wait until it has looked after all some more times, with LOOKS as sabotage."""
        self.says("looked", times=self.log().count("looked") + times)

    @contextlib.contextmanager
    def stopped(self):
        self.process.send_signal(signal.SIGSTOP)
        os.waitid(os.P_PID, self.process.pid, os.WSTOPPED)
        yield
        self.process.send_signal(signal.SIGCONT)

    def complaint(self):
        """Return the one warning or error that the log holds."""
        (line,) = re.findall(".*(?:WARNING|ERROR).*", self.log())
        return line

    def ends(self, number=signal.SIGTERM, tracebacks=0):
        """Send a signal, which ends the script cleanly and at once."""
        self.process.send_signal(number)
        for _ in range(200):  # 2 s; a computer that stands still does not count
            if self.process.poll() is None:
                time.sleep(0.01)
        assert self.process.poll() == 0 and self.log().count("Traceback") == tracebacks


class Rig(contextlib.ExitStack):
    """Broker, line and script in a folder of their own; nothing stays behind."""

    def __init__(self, broker=None, speaks=(19200, "E"), **settings):
        super().__init__()
        self.folder = Path(self.enter_context(tempfile.TemporaryDirectory()))
        self.broker = Broker(self.folder, **(broker or {}))
        self.line = Line(self.folder, speaks)
        parts = {"mqtt_port": self.broker.port, "serial_port": str(self.line.port)}
        self.script = Script(self.folder, **{**parts, **settings})
        for part in (self.broker.kill, self.line.pull, self.script.kill):
            self.callback(part)

    def begin(self, broker=True, adapter=True, **more):
        """Start the script, with the others or without, and wait for nothing."""
        if broker:
            self.broker.start()
        if adapter:
            self.line.plug()
        self.script.start(**more)
        return self

    def start(self):
        """Start all three, and wait until the script is connected and answers."""
        self.begin()
        self.script.says("connected to the MQTT broker", "the meter is on the line")
        return self

    def serve(self, watts=3000):
        """Publish a rest power that 30 divides, and wait until the line shows it."""
        self.broker.publish(str(watts))
        self.line.shows(watts // 30, watts // 30, watts // 30, watts // 10)
        return self


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
THIRDS = {  # what a phase and the total are read as, and the payloads that make it
    ("00 64", "01 2C"): ("3000", " \t3000\r\n", "+3000", "2999.7", "3e3"),  # 100, 300
    ("00 21", "00 64"): ("1000",),  # 33 and 100
    ("FF EF", "FF CE"): ("-500", "-.5E+3"),  # -17 and -50
    ("2A AA", "7F FF"): ("327670",),  # 10922 and 32767
    ("D5 56", "80 01"): ("-327670",),  # -10922 and -32767
    ("00 00", "00 00"): ("0", "-1"),
}
PAYLOADS = [(text, read) for read, texts in THIRDS.items() for text in texts]
BAD_PAYLOADS = [b"", b"  ", b"unavailable", b"nan", b"-inf", b"1_000", b"[3000]"]
BAD_PAYLOADS += ["٣٠٠٠".encode(), "３０００".encode(), b'{"value": 3000}', b"0x10"]
BAD_PAYLOADS += [b"\xff\x00\x1b[2J\n", b"3000,5", b"3000 W", b"1000 2000", b"--5"]
BAD_PAYLOADS += [b"327671", b"-327670.5", b"1e999"]


@pytest.mark.parametrize(("payload", "read"), PAYLOADS)
def test_value_is_read_as_a_third_on_each_phase_and_in_total(meter, payload, read):
    phase, total = (frame(f"3C 03 02 {value}") for value in read)
    meter.broker.publish("7777")
    meter.line.shows(259, 259, 259, 778)
    meter.broker.publish(payload)
    eventually(lambda: meter.line.ask(READS[0]) == phase, what=payload)
    answers = [meter.line.ask(request) for request in READS]
    assert answers == [phase, phase, phase, total]


def test_no_surplus_before_a_message_and_a_negative_one_where_it_is_wanted(rig):
    rig = rig(surplus_sign=-1).start()
    assert rig.line.power() == (0, 0, 0, 0)
    rig.broker.publish("3000")
    rig.line.shows(-100, -100, -100, -300)
    rig.broker.publish("-500")
    rig.line.shows(17, 17, 17, 50)


# the thread that looks after all sleeps for ever, so that only paho's thread runs on
FREEZE = "from paho.mqtt.client import Client\nstart = Client.loop_start\n"
FREEZE += "Client.loop_start = lambda it: (start(it), time.sleep(999))\n"
# prints what the datastore holds, since asking for it would be a poll
SPY = """
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


def test_registers_change_while_nobody_polls_and_outlive_the_adapter(rig):
    frozen = rig(sabotage=SPY + FREEZE).start()
    frozen.line.power()  # on which the server begins
    frozen.broker.publish("3000")
    frozen.script.says("datastore [300]")
    rig = rig(sabotage=SPY).start()
    rig.line.power()
    for turn, watts in enumerate((3000, 600), start=1):
        rig.broker.publish(str(watts))
        rig.script.says(f"datastore [{watts // 10}]")
        rig.line.pull()
        rig.script.says("is not there", times=turn)
        rig.broker.publish(str(watts + 30))
        rig.script.says(f"datastore [{watts // 10 + 3}]")
        rig.line.plug()
        rig.script.says("the meter is on the line", times=turn + 1)
        rig.line.shows(*3 * (watts // 30 + 1,), watts // 10 + 3)


@pytest.mark.parametrize("payload", BAD_PAYLOADS)
def test_bad_value_means_no_surplus_until_a_good_one(meter, payload):
    meter.serve()
    errors = meter.script.log().count(": serving 0 W until one comes")
    meter.broker.publish(payload)
    meter.line.shows(0, 0, 0, 0)
    meter.script.says(": serving 0 W until one comes", times=errors + 1)
    meter.serve()


def test_value_is_logged_as_a_sentence_and_a_bad_one_in_a_line_of_80_characters(meter):
    for it in (
        "0x",
        "3000",
        "0x",
        "-1234.5",
        "x" * 100_000 + "\n",
        "first\nsecond \x1b[31m red",
    ):
        meter.broker.publish(it)
    meter.script.says("INFO rest power 3000 W: 1000 W per phase")
    meter.script.says("INFO rest power -1234.5 W: -412 W per phase")
    meter.script.says("'" + "x" * 80 + "'", r"'first\nsecond \x1b[31m red'")


def test_value_older_than_max_age_is_no_surplus_with_or_without_the_broker(rig):
    short, usual = rig(max_age=2.5).start().serve(), rig().start().serve()
    short.line.shows(0, 0, 0, 0)
    short.script.says("WARNING no rest power for 2.5 s: serving 0 W")
    short.broker.publish("1000")
    short.line.shows(33, 33, 33, 100)
    short.line.shows(0, 0, 0, 0)
    short.script.says("WARNING no rest power for 2.5 s", times=2)
    assert short.script.log().count("WARNING no rest power") == 2
    usual.broker.kill()
    usual.script.sleeps(280)
    assert usual.line.power() == (100, 100, 100, 300)
    usual.script.sleeps(20)
    usual.line.shows(0, 0, 0, 0)


@pytest.mark.parametrize(("max_age", "repeats"), [(300, 1), (0, 0)])
def test_value_stays_fresh_if_repeated_or_without_a_limit(rig, max_age, repeats):
    rig = rig(max_age=max_age, sabotage=LOOKS).start().serve()
    for turn in (3, 4, 5):
        rig.script.sleeps(200)
        for _ in range(repeats):
            rig.broker.publish("3000")
            rig.script.says("rest power 3000 W: 1000 W per phase", times=turn - 1)
        rig.script.looks(2)
        assert rig.line.power() == (100, 100, 100, 300)
    assert "no rest power" not in rig.script.log()


def test_kept_value_is_not_taken_at_a_login_and_leaves_the_one_that_is_served(rig):
    rig = rig()
    with rig.broker.config.open("a") as config:
        config.write(f"persistence true\npersistence_location {rig.folder}/\n")

    def reconnect(times):
        rig.broker.kill(signal.SIGTERM)  # on which it saves what it retains
        rig.broker.start()
        rig.script.says("'2500' may be an old value that was kept", times=times)

    rig.broker.start().publish("2500", retain=True)
    rig.start().script.says("'2500' may be an old value that was kept")
    assert rig.line.power() == (0, 0, 0, 0)
    rig.serve()
    rig.script.sleeps(200)
    reconnect(times=2)
    assert rig.line.power() == (100, 100, 100, 300)
    rig.script.sleeps(100)
    rig.line.shows(0, 0, 0, 0)
    reconnect(times=3)
    assert rig.line.power() == (0, 0, 0, 0)
    rig.broker.publish("2500", retain=True)
    rig.line.shows(83, 83, 83, 250)


def test_value_that_got_old_in_the_computers_sleep_is_not_answered_even_once(rig):
    rig = rig(max_age=999, sabotage=FREEZE).start().serve()
    rig.script.sleeps(1000)
    assert rig.line.power() == (0, 0, 0, 0)
    rig.serve()


# --------------------------------- The settings ---------------------------------
def test_settings_stand_with_a_comment_each_at_the_top_of_the_script():
    top = SCRIPT[: SCRIPT.index("End of the settings")]
    assert top.count("\n") < 90
    assert re.findall(r"(?m)^([a-z_]+) = .+  # .+$", top) == list(DEFAULTS)


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
    "baudrate ": ("without quotes", "19200"),
    "parity": ("'E'", "even"),
    "stopbits": ("1 or 2", 1.5, 3),
    "unit_id": ("1 to 247", 0, 248),
    "surplus_sign": ("1 or -1", 0, -2),
    "max_age": ("seconds", -1, "300", 1 - 1j),
    "log_level": ("INFO", "LOUD"),
    "status_topic": ("topic", TOPIC, "meter/+"),
}
FAULTS = [(name, bad, row[0]) for name, row in IMPOSSIBLE.items() for bad in row[1:]]


@pytest.mark.parametrize(("name", "value", "allowed"), FAULTS)
def test_setting_that_cannot_work_ends_it_in_one_line(tmp_path, name, value, allowed):
    name = name.strip()
    script = Script(tmp_path, **{name: value}).start()
    assert script.process.wait(10) == 2
    (line,) = script.log().splitlines()
    begin = f"{name} = {value!r} " if name != "mqtt_password" else f"{name} cannot"
    assert line.startswith(begin) and allowed in line.removeprefix(begin)


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
    rig(mqtt_server=server).begin(broker=False).script.says("the meter is on the line")


# ------------------------------- Coming and going -------------------------------
def test_broker_absent_at_the_start_or_unknown_by_its_name_is_waited_for(rig):
    unknown = rig(mqtt_server="no-such-host.invalid").begin(broker=False)
    unknown.script.says("WARNING cannot reach the MQTT broker no-such-host.invalid")
    unknown.script.says("the meter is on the line")
    assert unknown.line.power() == (0, 0, 0, 0)
    rig = rig().begin(broker=False)
    rig.script.says("WARNING cannot reach the MQTT broker", "the meter is on the line")
    assert rig.line.power() == (0, 0, 0, 0)
    rig.broker.start()
    rig.script.says("connected to the MQTT broker")
    rig.serve()
    assert rig.script.log().count("cannot reach") == 1
    assert unknown.script.process.poll() is None


def test_broker_that_answers_nonsense_does_not_deafen_it_for_good(rig):
    rig = rig()
    with socket.create_server(("127.0.0.1", rig.broker.port)) as nonsense:
        rig.begin(broker=False)
        connection, _ = nonsense.accept()
        connection.recv(1000)
    # "wrong protocol version", and nobody there for the next: paho's thread dies of it
    connection.sendall(b"\x20\x02\x00\x01")
    connection.close()
    rig.script.says("ConnectionRefusedError")
    rig.broker.start()
    rig.script.says("connected to the MQTT broker")
    rig.serve()
    rig.broker.kill()
    with socket.create_server(("127.0.0.1", rig.broker.port)) as silent:
        silent.accept()[0].close()
        rig.script.says("closed the connection: check mqtt_port and mqtt_tls")


def test_adapter_absent_at_the_start_is_waited_for_and_all_that_is_asked_for(rig):
    rig = rig(READ_TIMEOUT=0.5).begin(adapter=False)
    rig.script.says("WARNING the adapter", "connected to the MQTT broker")
    rig.broker.publish("3000")
    rig.script.says("rest power 3000 W: 1000 W per phase")
    time.sleep(1.5)  # for a second try to open it, and a diagnosis, not to be said
    assert "has not read" not in rig.script.log()
    rig.line.plug()
    rig.script.says("the meter is on the line", "nothing came: check wires A and B")
    assert rig.line.power() == (100, 100, 100, 300)
    assert rig.script.log().count("is not there") == 1


def passwords(folder, password=PASSWORD):
    """Return how to build a broker with the login heatpump."""
    tool = shutil.which("mosquitto_passwd", path=os.environ["PATH"] + ":/usr/sbin")
    login = {"username": "heatpump", "password": password}
    subprocess.run([tool, "-b", "-c", folder / "list", *login.values()], check=True)
    return {"config": f"allow_anonymous false\npassword_file {folder}/list", **login}


@pytest.mark.parametrize("password", [PASSWORD, 47114711])
def test_password_is_let_in_even_unquoted_and_never_logged(rig, tmp_path, password):
    login = {"mqtt_username": "heatpump", "mqtt_password": password}
    broker = passwords(tmp_path, str(password))
    rig = rig(broker=broker, log_level="DEBUG", **login).start().serve()
    assert str(password) not in rig.script.log()


def test_wrong_password_is_said_once_and_tried_again(rig, tmp_path):
    login = {"mqtt_username": "heatpump", "mqtt_password": "wr0ng"}
    rig = rig(broker=passwords(tmp_path), **login).begin()
    rig.script.says("ERROR the MQTT broker")
    rig.broker.says("not authorised", times=3)
    refused = "refuses the login, check mqtt_username and mqtt_password: Not auth"
    assert refused in rig.script.complaint()
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
    rig = rig(broker={"config": config, **admin}).begin()
    rig.script.says("ERROR the MQTT broker")
    rig.broker.says("Received SUBSCRIBE from powermeter", times=3)
    refused = 'refuses topic "electricity/hp/restpower" to mqtt_username'
    assert rig.script.log().count(refused) == 1
    rights = ("subscribe", "publishClientSend")
    acls = [{"acltype": right, "allow": True} for right in rights]
    rules = json.dumps({"commands": [{"command": "setDefaultACLAccess", "acls": acls}]})
    rig.broker.publish(rules, topic="$CONTROL/dynamic-security/v1")
    rig.script.says("connected to the MQTT broker")
    rig.serve()


@pytest.fixture(scope="module")
def certificates(tmp_path_factory):
    """Return a folder with a CA, a certificate of it for localhost, and another CA."""
    folder = tmp_path_factory.mktemp("certificates")
    (folder / "names").write_text("subjectAltName = DNS:localhost")
    make = "req -newkey rsa:2048 -nodes -subj"
    for command in (
        f"{make} /CN=ca -x509 -keyout ca.key -out ca.crt",
        f"{make} /CN=other -x509 -keyout other.key -out other.crt",
        f"{make} /CN=broker -keyout b.key -out b.csr",
        "x509 -req -in b.csr -CA ca.crt -CAkey ca.key -extfile names -out b.crt",
    ):
        openssl = ["openssl", *command.split()]
        subprocess.run(openssl, cwd=folder, check=True, capture_output=True)
    return folder


def tls(folder, ca="ca.crt"):
    """Return the settings of a rig whose broker and script both have TLS."""
    config = f"allow_anonymous true\ncertfile {folder}/b.crt\nkeyfile {folder}/b.key"
    broker = {"config": config, "ca": str(folder / "ca.crt")}
    return {"broker": broker, "mqtt_tls": True, "mqtt_ca_file": str(folder / ca)}


@pytest.mark.parametrize("wrong", ["other.crt localhost", "ca.crt 127.0.0.1"])
def test_broker_whose_certificate_does_not_verify_is_refused(rig, certificates, wrong):
    ca, server = wrong.split()
    rig = rig(mqtt_server=server, **tls(certificates, ca)).begin()
    rig.script.says("ERROR cannot reach the MQTT broker", "the meter is on the line")
    assert "certificate verify failed" in rig.script.complaint()
    assert "mqtt_ca_file and mqtt_server" in rig.script.complaint()
    assert "connected" not in rig.script.log() and rig.line.power() == (0, 0, 0, 0)


def test_tls_trusts_the_ca_file_and_is_said_where_one_end_lacks_it(rig, certificates):
    settings = tls(certificates)
    rig(**settings).start().serve()
    plain = rig(broker=settings.pop("broker")).begin().script
    plain.says("closed the connection: check mqtt_port and mqtt_tls")
    script = rig(**settings).begin().script
    script.says("ERROR cannot reach the MQTT broker")
    assert "check mqtt_tls" in script.complaint()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_ctrl_c_and_sigterm_end_it_cleanly_also_without_all_or_searching(rig, number):
    whole = rig().start()
    whole.line.power()
    whole.script.ends(number)
    assert "closed" not in whole.script.log()
    whole.broker.says("Received DISCONNECT from powermeter")
    alone = rig().begin(broker=False, adapter=False).script
    alone.says("cannot reach the MQTT broker", "is not there")
    alone.ends(number)
    searching = rig(**HASTE, speaks=(38400, "N")).start()
    while searching.line.settings() == (19200, "E"):
        searching.line.ask(POLL, 0.2)
    searching.script.ends(number)


def test_stopped_terminal_stops_nothing_but_the_log(rig):
    rig = rig()
    terminal, end = pty.openpty()  # which nobody reads, as after Ctrl-S
    rig.callback(os.close, terminal)
    rig.begin(output=end)
    os.close(end)
    eventually(lambda: rig.line.ask(POLL, 0.5), what="an answer")
    for _ in range(3000):  # over twice what the queue and the terminal hold
        rig.broker.publish("600")
    rig.serve()
    rig.line.pull()
    rig.line.plug()
    eventually(lambda: rig.line.ask(POLL, 0.5), what="an answer after the pull")
    rig.script.sleeps(301)
    rig.line.shows(0, 0, 0, 0)
    rig.serve()
    rig.script.ends()


def test_error_beside_the_server_is_logged_once_and_all_goes_on(rig):
    sabotage = """
from paho.mqtt.client import Client
start = Client.loop_start
Client.loop_start = lambda self: (start(self), 1 / 0)
"""
    rig = rig(sabotage=sabotage).start().serve()
    rig.script.says("ERROR going on after an error: ZeroDivisionError")
    rig.broker.kill()
    rig.script.sleeps(301)
    rig.line.shows(0, 0, 0, 0)
    rig.script.ends(tracebacks=1)


def test_debug_shows_every_frame_and_default_settings_none_nor_a_status(rig):
    loud = rig(log_level="DEBUG").start()
    loud.line.ask(frame("3C 03 00 25 00 01"))
    loud.script.says("recv: 0x3c 0x3 0x0 0x25 0x0 0x1", "send: 0x3c 0x3 0x2 0x0 0x0")
    loud.line.send(frame("07 03 00 25 00 01"))
    loud.script.says("recv: 0x7 0x3 0x0 0x25 0x0 0x1")
    quiet = rig().start()
    quiet.line.ask(frame("3C 03 00 25 00 01"))
    quiet.script.says("the heat pump reads")
    quiet.script.ends()
    assert not re.search("0x3c|Server", quiet.script.log())  # pymodbus's lines
    assert "Received PUBLISH from powermeter" not in quiet.broker.log()


# ----------------------------- A shared, noisy line -----------------------------
POLL_7, POLL_9 = frame("07 03 00 25 00 01"), frame("09 03 00 25 00 01")
POLL = frame("3C 03 00 25 00 0E")  # what shows phases and total, 3000 W:
PHASE_3000 = "00 E6 00 2B 00 64 00 00 00 64"  # 230 V, 4.3 A, 1000 W, 0 var, cos phi 1
ANSWER = frame(f"3C 03 1C 00 64 00 00 00 64 {PHASE_3000} {PHASE_3000} 01 2C")
RESET = frame("3C 10 00 1D 00 02 04 00 00 00 00")
RESET_DONE = frame("3C 10 00 1D 00 02")
OTHERS = [unit for unit in range(1, 248) if unit != 60]


def pack(*numbers):
    """Return a frame of an unit id, a function code and some 16-bit numbers."""
    return frame(struct.pack(f">BB{len(numbers) - 2}H", *numbers))


def read_request(rng, unit):
    function, wire, count = rng.randint(1, 4), rng.randrange(65536), rng.randint(1, 125)
    return pack(unit, function, wire, count)


def read_answer(rng, unit):
    values = rng.randbytes(2 * rng.randint(1, 125))
    return frame(bytes([unit, rng.randint(1, 4), len(values)]) + values)


def write(rng, unit):
    values = rng.randbytes(2 * rng.randint(1, 123))
    size = len(values)
    return frame(struct.pack(">BBHHB", unit, 16, 29, size // 2, size) + values)


def unknown_function(rng, unit):
    data = rng.randbytes(rng.randint(0, 60))
    return frame(bytes([unit, rng.randint(0x41, 0x7F)]) + data)


OUR_ANSWERS = [RESET_DONE, frame("3C 83 02"), frame("3C 03 02 00 64")]
PARTS = [  # our unit id, a frame, of which something looks like a request to us, its end
    # a write to another unit: its data end like a request to us of function 0x41
    (60, "05 10 00 00 00 02 04" + frame("3C 41").hex(" "), "E6 BB"),
    (3, "03 03 00 1A 00 0B", "24 28"),  # 03 00 1A 00 0B has a good CRC as well
    (3, "01 03 00 02 00 01", "25 CA"),
    (1, "05 03 1C 00 01 00 00 20", "00 00"),
]
LOOKALIKE = frame("05 10 00 00 00 04 08" + POLL.hex())
FOREIGN = {  # of random numbers and another's unit id
    "requests to others": read_request,
    "others' answers": read_answer,
    "requests and answers": lambda rng, u: read_request(rng, u) + read_answer(rng, u),
    "writes to others": write,
    "writes and answers": lambda rng, u: write(rng, u) + pack(u, 16, 29, 2),
    "single writes to others": lambda rng, u: pack(u, 6, 29, rng.randrange(65536)),
    "others' exceptions": lambda rng, u: frame(f"{u:02X} 83 02"),
    "unknown functions": unknown_function,
    "a read by broadcast": lambda *_: frame("00 03 00 25 00 01"),
    "a write by broadcast": lambda *_: frame("00 10 00 25 00 01 02 12 34"),
    "broadcasts": lambda rng, _: rng.choice([read_request, write])(rng, 0),
    "noise": lambda rng, _: rng.randbytes(rng.randint(1, 40)),
    "long noise": lambda rng, _: rng.randbytes(rng.randint(250, 1200)),
    "more noise than a buffer": lambda rng, _: rng.randbytes(rng.randint(4000, 9000)),
    "zeros": lambda rng, _: bytes(rng.randint(1, 40)),
    "our unit id again and again": lambda rng, _: b"\x3c" * rng.randint(1, 40),
    "a foreign frame cut off": lambda rng, u: write(rng, u)[: rng.randint(1, 60)],
    "our frame cut off": lambda rng, _: POLL[: rng.randint(1, 7)],
    "our write cut off": lambda rng, _: write(rng, 60)[: rng.randint(1, 10)],
    "our frame with a broken CRC": lambda rng, _: POLL[:-2] + b"\xff\xff",
    "our answer echoed": lambda rng, _: ANSWER,
    "our other answers echoed": lambda rng, _: rng.choice(OUR_ANSWERS),
    "another's data that look like our request": lambda rng, _: LOOKALIKE,
}


@pytest.mark.parametrize("kind", FOREIGN)
def test_no_poll_is_lost_and_nothing_is_said_to_others_after(meter, kind):
    meter.serve()
    refused = (frame("3C 04 00 25 00 01"), frame("3C 84 01"))
    polls = [(POLL, ANSWER), (RESET, RESET_DONE), refused]
    rng, lost, spoken = random.Random(kind), 0, 0
    for turn in range(60):
        meter.line.send(FOREIGN[kind](rng, rng.choice(OTHERS)))
        # every other time the poll follows at once
        spoken += len(meter.line.hear(0.01 if turn % 2 else 0))
        poll, right = polls[turn // 2 % 3]
        answer = meter.line.ask(poll)
        lost += not answer.endswith(right)
        spoken += answer != right and answer != b""
    spoken += len(meter.line.hear(0.05))
    assert (lost, spoken) == (0, 0)


def test_poll_is_answered_in_pieces_behind_another_and_before_a_stray_byte(rig):
    rig = rig(PAUSE=1).start().serve()  # 1 s, as a pseudo line may deliver 0.3 s late
    another, other_answer = frame("3C 03 00 23 00 01"), frame("3C 03 02 00 E6")
    rows = [([POLL[:cut], POLL[cut:]], ANSWER) for cut in range(1, 8)]
    rows += [([RESET[:cut], RESET[cut:]], RESET_DONE) for cut in range(1, 13)]
    rows += [([bytes([byte]) for byte in POLL], ANSWER)]
    rows += [([another + POLL[:cut], POLL[cut:]], ANSWER) for cut in range(1, 8)]
    rows += [([b"\x55" * 300 + POLL[:4], POLL[4:]], ANSWER)] * 6
    for pieces, right in rows:
        for piece in pieces[:-1]:
            early = other_answer if another in piece else b""
            assert rig.line.ask(piece, 3 if early else 0.05) == early
        assert rig.line.ask(pieces[-1]) == right
    rng, lost = random.Random("stray byte"), 0
    for _ in range(200):
        rig.line.send(POLL)
        end = time.monotonic() + rng.uniform(0, 0.0005)
        while time.monotonic() < end:
            pass
        rig.line.send(b"\xff")
        lost += rig.line.answer() != ANSWER
    assert (lost, rig.line.hear(0.05)) == (0, b"")


@pytest.mark.parametrize(("unit", "begin", "end"), PARTS)
def test_part_of_a_frame_is_never_taken_for_a_request(rig, unit, begin, end):
    rig = rig(unit_id=unit, PAUSE=1).start()
    rig.line.registers(37, 1, unit)
    for _ in range(5):
        rig.line.send(bytes.fromhex(begin))
        assert rig.line.hear(0.02) == b""
        answer = rig.line.ask(bytes.fromhex(end), 0.2)
        assert answer[:2] == (b"\x03\x03" if begin.startswith("03 03") else b"")


def test_of_requests_that_piled_up_only_the_newest_is_answered(meter):
    meter.serve()
    with meter.script.stopped():
        meter.line.send(frame("3C 03 00 23 00 01") * 100 + frame("3C 03 00 32 00 01"))
    assert meter.line.answer() == frame("3C 03 02 01 2C")
    with meter.script.stopped():  # the master gives us up and asks another
        meter.line.send(POLL + frame("05 03 00 00 00 01"))
    assert meter.line.hear(0.1) == b""


def test_foreign_traffic_grows_neither_memory_nor_log_and_slows_no_answer(rig):
    rig, rng = rig().start().serve(), random.Random("a year")

    def memory():  # resident, in kB
        status = Path(f"/proc/{rig.script.process.pid}/status").read_text()
        return int(re.search(r"VmRSS:\s+(\d+)", status)[1])

    def traffic():
        for _ in range(500):
            rig.line.send(FOREIGN[rng.choice(list(FOREIGN))](rng, rng.choice(OTHERS)))
            rig.line.hear(0.0005)
        eventually(lambda: rig.line.ask(POLL).endswith(ANSWER), what="the answer")

    traffic()
    before, log = memory(), rig.script.log()
    for _ in range(6):
        traffic()
    assert memory() - before < 500
    assert rig.script.log() == log
    computing = ~rig.script.process.pid << 3 | 2  # the clock of its processor time
    before = time.clock_gettime(computing)
    for _ in range(600):
        rig.line.ask(rng.randbytes(1000), 0.002)  # in reads of their own
    assert rig.line.ask(POLL) == ANSWER
    assert time.clock_gettime(computing) - before < 3  # s


# --------------------------- Adapter, broker and load ---------------------------
@pytest.mark.parametrize("busy", [False, True], ids=["idle", "busy"])
def test_adapter_pulled_and_plugged_in_again_serves_the_newest_value(rig, busy):
    rig = rig().start().serve()
    for turn, watts in enumerate((600, 900), start=1):
        rig.line.send(POLL if busy else b"")
        rig.line.pull()
        rig.script.says("is not there", times=turn)
        rig.broker.publish(str(watts))
        rig.line.plug()
        back = time.monotonic()
        rig.script.says("the meter is on the line", times=turn + 1)
        assert time.monotonic() - back < 3
        rig.line.shows(*3 * (watts // 30,), watts // 10)
    assert rig.script.log().count("the meter is on the line") == 3  # a pull is one line
    assert re.findall("adapter|ERROR", rig.script.log()) == ["adapter"] * 2


@pytest.mark.parametrize("first", ["broker", "adapter"])
def test_broker_and_adapter_away_leave_the_last_value_then_the_newest(rig, first):
    rig = rig().start().serve()
    rig.broker.kill()
    rig.script.says("closed the connection: connecting again")
    assert rig.line.power() == (100, 100, 100, 300)
    rig.line.pull()
    rig.script.says("is not there", "cannot reach the MQTT broker")
    if first == "adapter":
        rig.line.plug()
        rig.script.says("the meter is on the line", times=2)
        assert rig.line.power() == (100, 100, 100, 300)
    rig.broker.start()
    rig.script.says("connected to the MQTT broker", times=2)
    rig.broker.publish("1000")
    rig.script.says("rest power 1000 W")
    if first == "broker":
        rig.line.plug()
        rig.script.says("the meter is on the line", times=2)
    assert rig.line.power() == (33, 33, 33, 100)
    rig.broker.publish("-500")
    rig.line.shows(-17, -17, -17, -50)


def test_no_serial_adapter_is_said_in_words_and_a_busy_one_taken_when_it_is_free(rig):
    file = rig()
    file.line.port.write_text("")
    file.begin(adapter=False).script.says("fails: ")
    rig = rig()
    rig.line.plug()
    with serial.Serial(str(rig.line.port), exclusive=True):
        rig.begin(adapter=False)
        rig.script.says("is in use by another program: trying every second")
    rig.script.says("the meter is on the line")
    assert rig.line.power() == (0, 0, 0, 0)


def test_port_without_parity_is_said_once_and_answers_at_once(rig):
    rig = rig(sabotage=NO_PARITY, speaks=None).begin()
    rig.script.says(
        "WARNING the adapter", "has no parity: a heat pump with even or odd"
    )
    assert rig.line.ask(POLL)[:3] == b"\x3c\x03\x1c"
    rig.script.says('19200 bit/s 8N1: set baudrate = 19200, parity = "N"')
    assert rig.script.log().count("has no parity") == 1


def test_missing_permission_is_said_with_its_cure(rig):
    rig = rig()
    rig.broker.start()
    device = rig.line.plug().port.resolve()
    shutil.chown(device, group="dialout")
    mode = device.stat().st_mode
    device.chmod(0)
    # root may open everything, unless it gives that up
    meek = ["setpriv", "--bounding-set=-dac_override,-dac_read_search"]
    rig.script.start(*(meek if os.getuid() == 0 else ()))
    rig.script.says("may not be opened", "add your user to the group dialout")
    device.chmod(mode)
    rig.script.says("the meter is on the line")
    assert rig.line.power() == (0, 0, 0, 0)


def test_flood_of_values_tears_no_reading_and_ends_with_the_last(rig):
    rig, readings = rig().start(), set()
    publisher = rig.broker.connect()
    for number in range(8000):
        publisher.publish(TOPIC, str(30 * (number % 2000 - 1000)))
        if number % 4 == 0:
            readings.add(rig.line.power())
    rig.line.shows(999, 999, 999, 2997)
    assert len(readings) > 100 and all(r == (*3 * r[:1], 3 * r[0]) for r in readings)


# --------------------------- The ALE3, register by register ---------------------------
PHASE = (230, 100, 230, 0, 100), (230, 100, 65306, 0, 100)
REGISTERS = [  # the first R, the datasheet's names, values for 6900 W, others for -6900 W
    (1, "firmware version, number of registers, of flags", (11, 52, 0)),
    (4, "baudrate, high and low word, not used", (1, 49664, 0)),  # 115200
    (7, "type: AL E3 D5 FD", (0x414C, 0x4533, 0x4435, 0x4644)),
    (11, "type: 10 C2 A0 0", (0x3130, 0x4332, 0x4130, 0x3000)),
    (15, "hardware version, serial number, not used", (11, 0, 0, 1, 0, 0, 0)),
    (22, "status, response timeout, Modbus address", (0, 60, 17)),
    (25, "error, not used, tariff", (0, 0, 0)),
    (28, "energy total and partial, tariffs 1 and 2", (0, 0, 0, 0, 0, 0, 0, 0)),
    (36, "voltage, current, active and reactive power, cos phi of phase 1", *PHASE),
    (41, "the same of phase 2", *PHASE),
    (46, "the same of phase 3", *PHASE),
    (51, "active and reactive power, total", (690, 0), (64846, 0)),
]


@pytest.mark.parametrize(("watts", "column"), [("6900", 2), ("-6900", 3)])
def test_each_register_is_that_of_the_datasheet(rig, watts, column):
    rig = rig(baudrate=115200, speaks=(115200, "E"), unit_id=17).start()
    rig.broker.publish(watts)
    rig.script.says(f"rest power {watts} W")
    read = [rig.line.registers(wire, 1, 17)[0] & 0xFFFF for wire in range(52)]
    expected = [row[column] if column < len(row) else row[2] for row in REGISTERS]
    assert read == [value for values in expected for value in values]


OTHER_FUNCTIONS = """
01 00 25 00 01 | 02 00 25 00 01 | 04 00 25 00 01 | 05 00 25 FF 00 | 06 00 25 12 34 | 07
08 00 00 A5 37 | 08 00 04 00 00 | 0B | 0C | 0F 00 25 00 08 01 FF | 11
14 07 06 00 04 00 01 00 02 | 15 09 06 00 04 00 07 00 01 12 34 | 16 00 25 00 F2 00 25
17 00 25 00 01 00 25 00 01 02 12 34 | 18 00 25 | 2B 0E 01 00 | 41
65 01 02 03 04 05 06 07 08 09 | 7F 00
"""  # each of its usual size, then all of one size: refused by their code, exception 1
OTHER_FUNCTIONS = re.split(r" \| |\n", OTHER_FUNCTIONS.strip())
OTHER_FUNCTIONS += [f"{code:02X} 00 25 00 01" for code in set(range(1, 128)) - {3, 16}]
# Requests and the replies at 3000 W: all begin with 3C and get their CRC.
REPLIES = table(f"""
a phase: 03 00 25 00 01 -> 03 02 00 64
type: 03 00 06 00 08 -> 03 10 41 4C 45 33 44 35 46 44 31 30 43 32 41 30 30 00
baudrate and address: 03 00 03 00 02 -> 03 04 00 00 4B 00
the last register: 03 00 33 00 01 -> 03 02 00 00
20 registers: 03 00 20 00 14 -> 03 28 00 00 00 00 00 00
  {PHASE_3000} {PHASE_3000} {PHASE_3000} 01 2C 00 00
21 registers: 03 00 00 00 15 | 126 registers: 03 00 00 00 7E -> 83 02
65535 registers: 03 00 00 FF FF | no register: 03 00 25 00 00 -> 83 02
behind the map: 03 00 34 00 01 | across the map's end: 03 00 33 00 02 -> 83 02
far outside: 03 FF FF 00 01 -> 83 02
reset partial 1: 10 00 1D 00 02 04 00 00 00 00 -> 10 00 1D 00 02
reset partial 2: 10 00 21 00 02 04 00 00 00 00 -> 10 00 21 00 02
set partial 1: 10 00 1D 00 02 04 00 00 00 01 -> 90 03
set partial 2: 10 00 21 00 02 04 12 34 00 00 -> 90 03
half a counter: 10 00 1D 00 01 02 00 00 -> 90 02
total counter: 10 00 1B 00 02 04 00 00 00 00 -> 90 02
both counters: 10 00 1B 00 04 08 00 00 00 00 00 00 00 00 -> 90 02
a value: 10 00 25 00 01 02 12 34 | the address: 10 00 17 00 01 02 00 05 -> 90 02
write behind the map: 10 00 34 00 01 02 00 00 -> 90 02
too many bytes: 10 00 1D 00 02 06 00 00 00 00 00 00 -> 90 03
too few bytes: 10 00 1D 00 02 02 00 00 | fewer than said: 10 00 1D 00 02 04 00 00 -> 90 03
more bytes than said: 10 00 1D 00 02 04 00 00 00 00 00 00 -> 90 03
a write cut short: 10 00 1D | a write cut shorter: 10 -> 90 03
a write without data: 10 00 1D 00 02 04 | of nothing: 10 00 1D 00 00 00 -> 90 03
""")
for request in OTHER_FUNCTIONS:
    REPLIES[f"function {request}"] = (request, f"{int(request[:2], 16) | 0x80:02X} 01")
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
    "another's of unknown size": frame("07 41").hex(),
    "our own answer": "[3C 03 02 00 64]",
    "our own answer with a zero behind, which leaves its CRC good": "[3C 03 02 00 64] 00",
    "a short answer with zeros behind": "[07 03 02 00 64] 00 00",
    "noise that would be an exception but for its code": frame("07 AF 0C").hex(),
    "our write cut short": "[3C 10 00 1D]?",
    "our read cut short, with a good CRC": frame("3C 03 00 25").hex(),
}


@pytest.fixture(scope="module")
def script(tmp_path_factory):
    """Return the script as a module, with the default settings."""
    file = Script(tmp_path_factory.mktemp("module")).file
    spec = importlib.util.spec_from_file_location("powermeter", file)
    spec.loader.exec_module(module := importlib.util.module_from_spec(spec))
    return module


@pytest.mark.parametrize(("request_", "reply"), REPLIES.values(), ids=REPLIES)
def test_meter_replies_as_the_datasheet_says(meter, script, request_, reply):
    meter.serve()
    before = [meter.line.registers(wire, 13) for wire in (0, 13, 26, 39)]
    assert meter.line.ask(frame(f"3C {request_}")) == frame(f"3C {reply}")
    assert [meter.line.registers(wire, 13) for wire in (0, 13, 26, 39)] == before
    assert meter.line.hear(0) == b""
    kind, code = bytes.fromhex(reply)[:2]
    assert script.refusal(bytes.fromhex(request_)) == (code if kind > 0x80 else None)


@pytest.mark.parametrize("text", FRAMES.values(), ids=FRAMES)
def test_frames_are_found_in_all_that_comes(script, text):
    marked = re.findall(r"\[(.*?)\](\??)", text)
    expected = [(frame(data), mark == "") for data, mark in marked]
    assert script.find_frames(bytes_of(text))[0] == expected


# ------------- The heat pump's serial settings, searched with little patience -------------
HASTE = {"PATIENCE": 0.5, "TICK": 0.05, "PAUSE": 0.05}  # s
SPOKEN = [(38400, "N"), (19200, "O"), (9600, "E"), (115200, "N"), (1200, "O")]
PROOFS = table("""
a request to us: [3C 03 00 25 00 0E] -> True
a request to others and its answer: [07 03 00 25 00 01] [07 03 02 00 00] -> True
one good frame, which may be chance: [07 03 00 25 00 01] -> False
exceptions, which chance makes easily: [07 83 02] [07 83 02] -> False
""")  # frames, and whether they prove the serial settings, so that noise moves nothing
SILENCES = table(f"""
nothing: -> nothing came: check wires A and B, adapter, the
no frame: {bytes(range(40)).hex()} -> no frame fits: trying other serial settings; swap A
a broken CRC: {POLL[:-1].hex()} 00 -> no frame fits: trying other serial settings
a silent unit: [09 03 00 25 00 01] -> asked in vain: set unit_id = 9$
two silent units: [09 03 00 25 00 01] [21 04 00 00 00 02] -> set unit_id = 9 or 33$
a neighbour that answers: [07 03 00 25 00 01] [07 03 02 00 00] [09 03 00 25 00 01]
  -> set unit_id = 9$
only neighbours that answer: [07 03 00 25 00 01] [07 83 02] [08 04 00 00 00 01]
  [08 04 02 00 00] -> it does not ask for a meter: switch it on in its settings
writes of one, which are answered by the same: [07 06 00 25 00 01] [07 06 00 25 00 01]
  [08 05 00 25 FF 00] [08 05 00 25 FF 00] -> it does not ask for a meter
short answers that look like requests: [07 01 00 00 00 18] [07 01 03 00 00 18]
  -> it does not ask for a meter
broadcasts and what is no unit id: [00 03 00 00 00 02] [F8 03 00 00 00 02]
  -> it does not ask for a meter
another function: [3C 04 00 25 00 01] -> refuses what it asks: 04 00 25
""")  # what comes on the line meanwhile, and the diagnosis


@pytest.mark.parametrize(("rate", "letter"), SPOKEN)
def test_serial_settings_of_the_heat_pump_are_found_and_said_once(rig, rate, letter):
    rig = rig(**HASTE, speaks=(rate, letter)).start()
    # the kernel checks parity: without it, a real adapter passes odd parity for even
    assert termios.tcgetattr(rig.line.ends[0])[0] & termios.INPCK
    rig.line.find()
    found = f'set baudrate = {rate}, parity = "{letter}", stopbits = 1\n'
    rig.script.says(f"INFO the heat pump speaks {rate} bit/s 8{letter}1: {found}")
    high, low = rig.line.registers(3, 2)
    assert high << 16 | low & 0xFFFF == rate
    rig.serve()
    assert rig.script.log().count("the heat pump speaks") == 1
    assert rig.script.log().count("the meter is on the line") == 1


def test_two_stop_bits_of_the_settings_are_tried_again_in_each_round(rig):
    rig = rig(stopbits=2, parity="N", **HASTE, speaks=(19200, "N")).start()
    os.write(rig.line.ends[0], b"noise")
    assert termios.tcgetattr(rig.line.ends[0])[2] & termios.CSTOPB
    eventually(lambda: rig.line.ask(POLL, 0.4), what="an answer")
    assert "the heat pump speaks" not in rig.script.log()


def test_round_without_success_is_said_once_and_a_late_heat_pump_found(rig):
    rig, seen = rig(**HASTE).start(), []
    while rig.script.log().count("no serial settings fit: swap A and B") == 0:
        seen += rig.line.noise(1)
    for settings in ((1200, "O"), (19200, "E")):  # to the end of another round
        while rig.line.settings() != settings:
            seen += rig.line.noise(0.01)
    assert set(seen) == {(r, p) for r in SPEEDS for p in "ENO"}
    assert seen.count((19200, "E")) == max(map(seen.count, seen))
    assert rig.script.log().count("WARNING") == 1
    rig.line.find()
    assert "the heat pump speaks" not in rig.script.log()


def test_bytes_without_a_gap_do_not_hold_up_the_search(rig):
    line = rig(PATIENCE=0.5, PAUSE=0.5, speaks=(19200, "N")).start().line

    def moved_on():
        os.write(line.ends[0], bytes(range(32)))
        assert line.hear(0.01) == b""
        return line.settings() != (19200, "E")

    eventually(moved_on, what="other settings")
    line.find()


def test_silence_a_good_frame_and_rare_noise_move_no_serial_setting(rig):
    rig, begin = rig(sabotage=LOOKS, speaks=(19200, "O")).start(), time.monotonic()

    def stays(seconds, data):  # whether it keeps its settings, with data after seconds
        before = rig.line.settings()
        rig.script.sleeps(seconds)
        rig.script.looks(2)
        os.write(rig.line.ends[0], data)
        rig.script.looks(4)
        return rig.line.settings() == before

    assert stays(0, b"noise")
    assert stays(10, POLL_9)  # a good frame: the noise before it does not count
    assert stays(10, b"noise") and stays(10, b"noise")
    assert stays(1000, b"noise")  # the noise before it does not count either
    assert stays(10, b"noise") and not stays(10, b"noise")
    assert stays(1000, b"")  # the same during the search
    assert not stays(0, b"noise")
    assert time.monotonic() - begin > 8  # s, for 48 looks of 0.2 s each
    rig.line.find()


@pytest.mark.parametrize(("frames", "are_proof"), PROOFS.values(), ids=PROOFS)
def test_two_good_frames_or_one_to_us_prove_the_settings(rig, frames, are_proof):
    line = rig(**HASTE).start().line
    line.ask(bytes_of(frames), 0.2)
    assert str(set(line.noise(3)) == {(19200, "E")}) == are_proof
    line.find()


def test_frames_in_pieces_fit_and_settings_that_answer_are_not_left_any_more(rig):
    rig = rig(PATIENCE=2, PAUSE=1, TICK=0.3, sabotage=LOOKS, speaks=(19200, "N"))
    line, right = rig.start().line, (19200, "N")

    def fits(data, looks=9):  # that is more than two PAUSEs
        os.write(line.ends[0], data)
        rig.script.looks(looks)
        return line.settings() == right and line.hear(0) == b""

    turns = [*[b""] * 8, b"noise"] * 10
    eventually(lambda: fits(turns.pop(), 1), 30, "the settings")  # seen at once
    assert fits(b"\x55" * 300 + POLL[3:])  # began with the settings before
    assert fits(POLL_9[:3], 1) and fits(POLL_9[3:] + b"noise")
    assert fits(b"noise", 1) and line.ask(POLL)[:3] == b"\x3c\x03\x1c"
    for _ in range(6):  # noise that cuts no poll
        assert fits(b"\x55" * 300, 1) and fits(POLL[:4], 2)
        assert line.ask(POLL[4:])[:3] == b"\x3c\x03\x1c"


def test_adapter_pulled_during_the_search_goes_on_with_it(rig):
    rig = rig(**HASTE, speaks=(38400, "N")).start()
    while rig.line.settings() == (19200, "E"):
        rig.line.ask(POLL, 0.2)
    rig.line.pull()
    rig.script.says("is not there: trying every second")
    rig.line.plug()
    rig.script.says("the meter is on the line", times=2)
    assert rig.line.settings() == (19200, "N")  # those that were in use
    rig.line.find()
    rig.serve()
    rig.line.pull()
    rig.line.plug()
    rig.script.says("the meter is on the line", times=3)
    assert rig.line.power() == (100, 100, 100, 300)  # found once, it needs no search
    assert "never retrieved" not in rig.script.log()


# ----------------------------- Knowing what is going on -----------------------------
@pytest.mark.parametrize("heard", [b"", b"\0", ANSWER, POLL_9])
def test_log_says_when_the_heat_pump_that_read_once_stops_to_ask(rig, heard):
    rig = rig(sabotage=LOOKS).start()
    stopped = "the heat pump has not read for 60 s: it stopped asking: is it on"
    for turn in (1, 2):
        rig.line.ask(POLL)
        rig.line.send(heard)
        rig.script.says("INFO the heat pump reads the meter, unit 60", times=turn)
        rig.script.looks(2)
        assert rig.script.log().count("has not read") == turn - 1
        rig.script.sleeps(60)
        rig.script.says(f"WARNING {stopped}, are all wires", times=turn)


@pytest.mark.parametrize(("heard", "diagnosis"), SILENCES.values(), ids=SILENCES)
def test_silence_from_the_start_is_diagnosed_once(rig, heard, diagnosis):
    rig = rig(status_topic=STATUS, sabotage=LOOKS).start()
    rig.broker.publish("3000")
    rig.line.send(bytes_of(heard))
    rig.script.looks(3)
    assert "has not read" not in rig.script.log()
    rig.script.sleeps(60)
    rig.script.says("has not read for 60 s")
    rig.script.looks(2)  # for a second warning, which must not come
    assert re.search(diagnosis, rig.script.complaint())
    assert "reads the meter" not in rig.script.log()


def seen(words, *expected):
    """Wait until exactly these words came, each within the 5 s that are promised."""
    for number, word in enumerate(expected, start=1):
        eventually(lambda: len(words) >= number, 5, what=word)  # noqa: B023
        assert words[number - 1][0] == word


@pytest.mark.parametrize("end", [signal.SIGTERM, signal.SIGKILL])
def test_status_follows_the_heat_pump_a_reconnect_and_the_end_of_the_script(rig, end):
    rig, words = rig(status_topic=STATUS), []
    rig.broker.start().watch(words)
    rig.start()
    seen(words, "no heat pump")
    rig.broker.kill()
    rig.script.says("cannot reach the MQTT broker")
    rig.broker.start()
    words.clear()
    rig.script.says("connected to the MQTT broker", times=2)
    rig.broker.watch(words)
    seen(words, "no heat pump")
    rig.line.ask(POLL)
    seen(words, "no heat pump", "online")
    rig.script.sleeps(60)
    seen(words, "no heat pump", "online", "no heat pump")
    rig.line.ask(POLL)
    seen(words, "no heat pump", "online", "no heat pump", "online")
    rig.broker.watch(words)
    seen(words, "no heat pump", "online", "no heat pump", "online", "online")
    assert words[-1] == ("online", True)  # retained
    words.clear()
    rig.script.kill(end)
    seen(words, "offline")
    eventually(lambda: len(words) == 2, what="offline for both watchers")
    rig.broker.watch(words)
    eventually(lambda: words[2:] == [("offline", True)], what="the retained offline")


# ------------------------------------ The sunny day ------------------------------------
DAY = 30  # s that the day from 6 to 21 o'clock takes

IGNORING_CTRL_C = ("sh", "-c", 'trap "" INT; exec "$@"', "sh")  # as a shell's "&"
ENDS = [(("env", "--default-signal=INT"), signal.SIGINT), ((), signal.SIGTERM)]
ENDS += [((), signal.SIGHUP), (IGNORING_CTRL_C, signal.SIGTERM)]


@contextlib.contextmanager
def day_of(seconds, *prefix):
    """Play a day of another length as its user does; it leaves nothing behind."""
    with tempfile.TemporaryDirectory() as parent:
        folder, day = Path(parent) / "day", Program(Path(parent) / "log")
        (folder / "tmp").mkdir(parents=True)
        shutil.copy(HERE / "powermeter.py", folder)
        text = (HERE / "test_powermeter.py").read_text()
        text, found = re.subn(r"(?m)^DAY = \d+", f"DAY = {seconds}", text)
        assert found == 1
        (folder / "test_powermeter.py").write_text(text)
        more = {"TMPDIR": str(folder / "tmp"), "PYTHONDONTWRITEBYTECODE": "1"}
        command = [*prefix, sys.executable, "test_powermeter.py"]
        day.run(*command, cwd=folder, env={**os.environ, **more})
        yield day
        left = {str(path.relative_to(folder)) for path in folder.rglob("*")}
        assert left == {"powermeter.py", "test_powermeter.py", "tmp"}
        for process in Path("/proc").glob("[0-9]*/cmdline"):
            with contextlib.suppress(OSError):
                assert str(folder) not in process.read_text()


def test_sunny_day_ends_by_itself_and_leaves_nothing_behind():
    with day_of(2.5) as day:
        assert day.process.wait(120) == 0, day.log()
        row = r"(?m)^ \d\d:\d\d +(-?\d+\.\d\d) +\1 +\1 +(-?\d+\.\d\d) .*$"
        rows = [tuple(map(float, found)) for found in re.findall(row, day.log())]
    assert len(rows) >= 2
    totals = [total for _, total in rows]
    assert totals[0] < 0 < max(totals) and totals[-1] < 0
    assert all(abs(3 * phase - total) < 0.03 for phase, total in rows)


@pytest.mark.parametrize(("prefix", "number"), ENDS)
def test_sunny_day_leaves_nothing_behind_when_it_is_ended(prefix, number):
    with day_of(30, *prefix) as day:
        eventually(lambda: re.search(r"(?m)^ \d\d:\d\d", day.log()), 30, "a row")
        day.process.send_signal(number)
        assert day.process.wait(10) == 0 and "Traceback" not in day.log()


def rest_power(minute, rng):
    """Return the rest power in W at a minute of a sunny day with clouds."""
    sun = max(0.0, sin((minute - 390) / 840 * pi)) ** 1.5 * 8000
    cloud = 0.35 + 0.65 * abs(sin(minute / 47)) if 600 < minute < 1020 else 1.0
    house = 450 + 250 * abs(sin(minute / 23)) + rng.uniform(-60, 60)
    return round(sun * cloud - house)


def play_day():
    """Publish the day's rest power minute by minute, and print what the meter shows."""
    rng, last_ten, printed = random.Random("sun"), deque(maxlen=10), 0.0
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
                numbers = "  ".join(f"{value:7.2f}" for value in (*power, balanced))
                left, right = (round(sign * power[3] * 4) * "#" for sign in (-1, 1))
                row = f"{numbers}  {left[:8]:>8}|{right}"
                print(f" {minute // 60:02}:{minute % 60:02}  {row}", flush=True)


if __name__ == "__main__":
    # Whatever ends the day early, also a closed terminal, the rig takes itself down.
    for end in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(end, lambda *_: sys.exit(0))
    with contextlib.suppress(KeyboardInterrupt):
        play_day()
