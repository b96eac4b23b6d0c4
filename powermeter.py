"""Viessmann's energy meter, a rebranded Saia-Burgess ALE3, emulated on RS-485.

    restPower = hpPower - gridPower    W left for the heat pump; see the README
    MQTT broker -> Broker.on_rest_power -> Meter -> pymodbus's server -> heat pump

paho's thread writes each rest power into the meter's registers. The main thread first
listens for the heat pump's serial settings, then serves the registers with them.
look_after(), a third one, does what is due by time, and a fourth writes the log.

Edit the settings, then start it in the README's environment: python3 powermeter.py
"""

# ============================== Settings ==============================
topic = "electricity/hp/restpower"  # topic of the rest power, in Watt
mqtt_server = "localhost"  # the broker's name or IP address
mqtt_port = 1883  # the broker's port: 1883, with TLS mostly 8883
mqtt_username = ""  # login at the broker; "" = without
mqtt_password = ""  # its password; "" = without
mqtt_tls = False  # True = encrypted, and the broker's certificate is verified
mqtt_ca_file = ""  # CA file for a broker's own certificate; "" = the system's CAs
max_age = 300  # s, a value older than that is served as 0 W; 0 = no limit
status_topic = ""  # topic that says whether the heat pump reads the meter; "" = none

serial_port = "/dev/ttyUSB0"  # the adapter; better its name in /dev/serial/by-id/
baudrate = 19200  # bit/s; the heat pump's own is found, this is only tried first
parity = "E"  # "E" = even, "O" = odd, "N" = none; found as well
stopbits = 1  # 1 or 2; the search tries only 1, as that receives frames with 2 too
unit_id = 60  # the meter's Modbus address, 1 to 247
surplus_sign = 1  # 1 = the heat pump wants surplus positive, -1 = negative
log_level = "INFO"  # "DEBUG" = every frame too; "WARNING", "ERROR" = less
# ========================= End of the settings =========================

import asyncio
import errno
import glob
import grp
import logging
import os
import queue
import re
import signal
import socket
import ssl
import struct
import sys
import termios
import threading
from enum import Enum
from functools import partial
from itertools import cycle
from logging.handlers import QueueHandler, QueueListener
from time import CLOCK_BOOTTIME, clock_gettime, sleep
from typing import NamedTuple

import serial
from paho.mqtt.client import CallbackAPIVersion, Client
from pymodbus.constants import ExcCodes
from pymodbus.framer import FramerRTU
from pymodbus.pdu import ExceptionResponse
from pymodbus.server import ModbusSerialServer, StartSerialServer
from pymodbus.server.requesthandler import ServerRequestHandler
from pymodbus.simulator import DataType, SimData, SimDevice

TICK = 0.2  # s between two looks at what is due
REPORT_EVERY = 60  # s between two lines on how all is going
now = partial(clock_gettime, CLOCK_BOOTTIME)  # s, goes on while a computer sleeps
log = logging.getLogger("powermeter")
stopping = False  # whether Ctrl-C or SIGTERM came; each loop looks at it
last_said = {}  # subject: the last line that say() wrote on it


def say(subject, write, line):
    """Write a line by a method of log, unless it was the last one on its subject."""
    if last_said.get(subject) != line:
        last_said[subject] = line
        write(line)


# ---------------------------- Settings that cannot work -------------------------------
BAUDRATES = (19200, 9600, 38400, 115200, 57600, 4800, 2400, 1200)  # likely ones first
LOG_LEVELS = ("DEBUG", "INFO", "WARNING", "ERROR")


def is_text(value):
    """Return whether value is a text that the system can take as a name."""
    return type(value) is str and "\0" not in value


def is_topic(value):
    """Return whether value is the name of one topic, with no blank at its ends."""
    if not is_text(value) or value == "" or value != value.strip():
        return False
    return "+" not in value and "#" not in value


def is_status_topic(value):
    """Return whether value is a topic other than that of the rest power, or ""."""
    return value == "" or (is_topic(value) and value != topic)


def is_host(value):
    """Return whether value can be a host name or an IP address, without a port."""
    if not is_text(value) or any(sign in value for sign in " /@[]"):
        return False
    if value.count(":") == 1:  # a name with a port; an IPv6 address has more colons
        return False
    labels = value.removesuffix(".").split(".")
    # A label of another length makes the look-up raise UnicodeError, not OSError, which
    # would end paho's thread.
    return all(1 <= len(label) <= 63 for label in labels)


def is_login(value):
    """Return whether value can be a user name or a password; digits need no quotes."""
    return is_text(value) or type(value) is int


def is_ca_file(value):
    """Return whether value is the path of a file with a CA in it, or ""."""
    if value == "":
        return True
    if not is_text(value):
        return False
    try:
        ssl.create_default_context(cafile=value)  # only this tells what is in the file
    except OSError:
        return False
    return True


def is_seconds(value):
    """Return whether value is a number of seconds, 0 or more."""
    return type(value) in (int, float) and value >= 0


def is_path(value):
    """Return whether value is the full path of a file or device."""
    return is_text(value) and value.startswith("/")


def is_between(lowest, highest):
    """Return a test whether a value is a whole number from lowest to highest."""
    return lambda value: type(value) is int and lowest <= value <= highest


def is_one_of(*allowed):
    """Return a test whether a value is one of those allowed; True is not 1."""
    return lambda value: type(value) is type(allowed[0]) and value in allowed


SETTINGS = (  # name, test, what it may be
    ("topic", is_topic, "a topic without + and #, with no blank at its ends"),
    ("mqtt_server", is_host, "a host name or an IP address, without a port"),
    ("mqtt_port", is_between(1, 65535), "1 to 65535, without quotes"),
    ("mqtt_username", is_login, "a text, or '' for none"),
    ("mqtt_password", is_login, "a text, or '' for none"),
    ("mqtt_tls", is_one_of(True, False), "True or False, without quotes"),
    ("mqtt_ca_file", is_ca_file, "'' or a CA file"),
    ("max_age", is_seconds, "a number of seconds, or 0, without quotes"),
    (
        "status_topic",
        is_status_topic,
        'a topic in quotes, other than topic, or "" for none',
    ),
    (
        "serial_port",
        is_path,
        "the path of a device, such as '/dev/ttyUSB0'; for a gateway see the README",
    ),
    (
        "baudrate",
        is_one_of(*BAUDRATES),
        "1200, 2400, 4800, 9600, 19200, 38400, 57600 or 115200, without quotes",
    ),
    ("parity", is_one_of("E", "O", "N"), "'E', 'O' or 'N'"),
    ("stopbits", is_one_of(1, 2), "1 or 2, without quotes"),
    ("unit_id", is_between(1, 247), "1 to 247, without quotes"),
    ("surplus_sign", is_one_of(1, -1), "1 or -1, without quotes"),
    ("log_level", is_one_of(*LOG_LEVELS), "'DEBUG', 'INFO', 'WARNING' or 'ERROR'"),
)


def check_settings():
    """End the script with status 2 and one line where a setting cannot work."""
    for name, can_work, allowed in SETTINGS:
        if name in globals() and can_work(globals()[name]):
            continue
        if name not in globals():
            fault = "is missing"
        elif name == "mqtt_password":
            fault = "cannot work"  # a password is never shown
        else:
            fault = f"= {globals()[name]!r} cannot work"
        print(f"{name} {fault}, it may be: {allowed}", file=sys.stderr)
        sys.exit(2)


# ------------------- The meter: Saia-Burgess ALE3, datasheet 26-527 -------------------
VOLTAGE = 230  # V
MAX_WATTS = 327670  # W; R51 holds at most 32767 times 10 W
REGISTERS = 52  # R1 to R52 at the wire addresses 0 to 51
MAX_READ = 20  # registers in one read
READ = 3  # function code of Read Holding Registers
WRITE = 16  # function code of Write Multiple Registers
RESETTABLE = ((29, 2), (33, 2))  # wire address and count of R30-31 and R34-35


def as_register(number):
    """Return a number from -32768 to 32767 as a register of 16 bits holds it."""
    return number & 0xFFFF


def meter_registers(watts, rate):
    """Return R1 to R52 for a rest power in W and a baudrate in bit/s."""
    current = round(abs(watts) / 3 / VOLTAGE * 10)  # 0.1 A per phase
    power = as_register(surplus_sign * round(watts / 30))  # 10 W per phase
    total = as_register(surplus_sign * round(watts / 10))  # 10 W
    phase = (VOLTAGE, current, power, 0, 100)  # V, 0.1 A, 10 W, 10 var, cos phi in 0.01
    return [
        *(11, REGISTERS, 0),  # R1-3 firmware version 1.1, number of registers, of flags
        *(rate >> 16, rate & 0xFFFF, 0),  # R4-5 baudrate, bit/s, R6 not used
        *struct.unpack(">8H", b"ALE3D5FD10C2A00\0"),  # R7-14 type
        *(11, 0, 0, 1, 0, 0, 0),  # R15 hardware 1.1, R16-18 serial no., R19-21 not used
        *(0, 60),  # R22 status, 0 = no problem, R23 response timeout, ms
        *(unit_id, 0, 0, 0),  # R24 Modbus address, R25-27 errors, not used, tariff
        *[0] * 8,  # R28-35 energy, 0.01 kWh; 0, as counts would be lost at restarts
        *(phase * 3),  # R36-50 phases 1 to 3
        *(total, 0),  # R51-52 total power, 10 W, and reactive power, 10 var
    ]


def refusal(pdu):
    """Return the exception code for a request (its function code first), or None.

    A READ has its 5 bytes, see possible_frames(); a WRITE can be of any length.
    """
    function = pdu[0]
    if function == READ:
        wire_address, count = struct.unpack(">HH", pdu[1:])
        fits = 1 <= count <= MAX_READ and wire_address + count <= REGISTERS
        return None if fits else ExcCodes.ILLEGAL_ADDRESS  # the datasheet's code
    if function != WRITE:
        return ExcCodes.ILLEGAL_FUNCTION
    if len(pdu) < 6:  # too short to have values
        return ExcCodes.ILLEGAL_VALUE
    wire_address, count, byte_count = struct.unpack(">HHB", pdu[1:6])
    values = pdu[6:]
    if count == 0 or byte_count != 2 * count or byte_count != len(values):
        return ExcCodes.ILLEGAL_VALUE
    if (wire_address, count) not in RESETTABLE:
        return ExcCodes.ILLEGAL_ADDRESS
    if any(values):  # a reset writes only zeros
        return ExcCodes.ILLEGAL_VALUE
    return None


class Meter(SimDevice):
    """pymodbus's datastore: paho's thread writes it, pymodbus's server reads it."""

    def __init__(self):
        everything = SimData(address=0, count=REGISTERS, datatype=DataType.REGISTERS)
        super().__init__(unit_id, everything)
        # What a server works with: first address, list of registers, their types. It
        # copies none of them: what is written to this list, is what is read.
        self.built = super().build_device()
        _first, self.registers, _types = self.built
        self.lock = threading.Lock()  # our own threads hold it when they write
        self.watts = None  # W, the last rest power; None = none that can be trusted
        self.arrival = now()  # s, when that came
        self.is_too_old = False  # whether 0 W is served instead
        self.baudrate = baudrate  # bit/s, shown in R4-5
        self.write_registers()

    def build_device(self):
        """Give pymodbus the same list for each server, as after a pulled adapter."""
        return self.built

    def write_registers(self):
        """Show the rest power, or 0 W, in the registers; the caller has the lock."""
        watts = 0.0 if self.watts is None or self.is_too_old else self.watts
        # One assignment, as a read is one slice: it sees all old or all new ones.
        self.registers[:REGISTERS] = meter_registers(watts, self.baudrate)

    def take(self, watts):
        """Take a new rest power in W; None = one that cannot be trusted, so 0 W."""
        with self.lock:
            self.watts = watts
            self.arrival = now()
            self.is_too_old = False
            self.write_registers()

    def drop_old_value(self):
        """Serve 0 W from now on if the rest power has become older than max_age."""
        with self.lock:
            age = now() - self.arrival
            if max_age == 0 or age <= max_age or self.is_too_old:
                return
            self.is_too_old = True
            self.write_registers()
        log.warning("no rest power for %g s: serving 0 W until one comes", max_age)

    def show_baudrate(self, rate):
        """Show the speed of the line, in bit/s, as the meter's own."""
        with self.lock:
            self.baudrate = rate
            self.write_registers()

    def report(self):
        """Return which power is served, and why."""
        with self.lock:
            watts, is_too_old = self.watts, self.is_too_old
            age = now() - self.arrival
        if watts is None:
            return "serving 0 W, as there is no rest power"
        if is_too_old:
            return f"serving 0 W, as {watts:g} W are {age:.0f} s old"
        return f"serving {watts:g} W, {age:.0f} s old"


# -------------------------- MQTT: where the value comes from --------------------------
SETTLING = 5  # s after a login in which a broker may send what it has kept
NEWS_AFTER = 10  # s without a rest power, after which the next one is logged at INFO
NO_MESSAGE = 30  # s without any message, after which the topic counts as doubtful
SHOWN = 80  # characters of a message that the log shows
STATUS_EVERY = 30  # s after which the same status is published again
LOGIN_REFUSED = ("Bad user name or password", "Not authorized")  # in paho's words
# A plain number; float() alone would take nan, 1_000 and other alphabets' digits too.
NUMBER = re.compile(r"\s*[+-]?(\d+(\.\d*)?|\.\d+)([eE][+-]?\d+)?\s*", re.ASCII)


def rest_power(text):
    """Return (W, "") for a text with a rest power, else (None, what is wrong)."""
    if not NUMBER.fullmatch(text):
        return None, "is no plain number of W such as 3000"
    if abs(float(text)) > MAX_WATTS:
        return None, f"is beyond ±{MAX_WATTS} W"
    return float(text), ""


class Broker(Client):
    """The connection to the MQTT broker; paho's thread calls the methods on_..."""

    def __init__(self, meter):
        client_id = f"powermeter-{os.urandom(4).hex()}"  # random, but kept for relogins
        super().__init__(CallbackAPIVersion.VERSION2, client_id)
        self.meter = meter
        self.name = f"the MQTT broker {mqtt_server}:{mqtt_port}"
        # Of the present connection:
        self.login = None  # the broker's answer to it, a ReasonCode; None = none yet
        self.login_time = 0.0  # s, when it was accepted
        self.is_first = True  # whether the next message is the first one
        self.doubted = None  # that message, if it may be an old one
        self.last_status = ""  # the last that was published
        self.status_time = 0.0  # s, when that was
        # Since the start:
        self.subscribed = None  # s, when the topic was subscribed; None = not yet
        self.has_message = False  # whether any message came
        self.last_watts = None  # W, the last rest power that was taken; None = none yet
        self.has_status = False  # whether any status was published
        self.is_news_next = True  # whether the next rest power is logged at INFO
        self.last_bad = None  # the text of the last message, if that was no rest power
        self.reconnect_delay_set(1, 10)  # s between two tries
        self.username_pw_set(str(mqtt_username) or None, str(mqtt_password) or None)
        if mqtt_tls:
            self.tls_set(mqtt_ca_file or None)
        if status_topic:
            self.will_set(status_topic, "offline", retain=True)
        # Messages of other topics, which some brokers send as well, go nowhere.
        self.message_callback_add(topic, self.on_rest_power)
        self.connect_async(mqtt_server, mqtt_port, keepalive=10)  # s

    def may_be_old(self, message, watts):
        """Return whether a message may be one that the broker has kept, of any age."""
        if max_age == 0:  # then any age will do
            return False
        if self.is_first:
            return self.first_may_be_kept(message, watts)
        return self.is_doubted_again(message)

    def first_may_be_kept(self, message, watts):
        """Return whether the first message after a login may be a kept one.

        Most brokers flag it as retained. FHEM and others do not: then it is mostly the
        value that came last. (Nothing tells it where none came yet: it is taken.)
        """
        if message.retain:
            return True
        return watts is not None and watts == self.last_watts

    def is_doubted_again(self, message):
        """Return whether a message is the doubted one, which the broker sends again.

        ioBroker does so 2 s after a login. Where the first has the retain flag and the
        same without it follows, that is another broker, and the second one is live.
        """
        if self.doubted is None or now() - self.login_time > SETTLING:
            return False
        is_the_same = message.payload == self.doubted.payload
        lost_its_flag = self.doubted.retain and not message.retain
        return is_the_same and not lost_its_flag

    def on_rest_power(self, _client, _userdata, message):
        """Take the rest power into the meter, or 0 W for what is none.

        One that may be old changes nothing: the meter goes on with what it has.
        """
        text = message.payload.decode(errors="replace")
        watts, fault = rest_power(text)
        is_old = self.may_be_old(message, watts)
        self.is_first = False
        self.has_message = True
        if is_old:
            if self.doubted is None:
                kept = "may be an old value that was kept: waiting for the next one"
                log.info("%a %s", text[:SHOWN], kept)
            self.doubted = message
            return
        self.doubted = None
        is_news = self.is_news()  # by the value before this one
        self.meter.take(watts)
        if fault:
            if text != self.last_bad:
                log.error("%a %s: serving 0 W until one comes", text[:SHOWN], fault)
            self.last_bad = text
        else:
            level = logging.INFO if is_news else logging.DEBUG
            log.log(level, "rest power %g W: %d W per phase", watts, round(watts / 3))
            self.last_bad = None
            self.last_watts = watts
        self.is_news_next = fault != ""

    def is_news(self):
        """Return whether a rest power that has just come is logged at INFO."""
        was_quiet = now() - self.meter.arrival > NEWS_AFTER
        return self.is_news_next or self.meter.is_too_old or was_quiet

    def on_pre_connect(self, _client, _userdata):
        """Begin a login."""
        self.login = None

    def on_connect(self, _client, _userdata, _flags, reason, _properties):
        """Subscribe, anew at each login; or say that the broker refuses it."""
        self.login = reason
        if reason.is_failure:
            what = "the connection, trying again"
            if str(reason) in LOGIN_REFUSED:
                what = "the login, check mqtt_username and mqtt_password"
            say("broker", log.error, f"{self.name} refuses {what}: {reason}")
            return
        self.login_time = now()
        self.is_first = True
        self.doubted = None
        self.is_news_next = True
        self.last_status = ""  # so that look_after() publishes it
        self.subscribe(topic)

    def on_subscribe(self, _client, _userdata, _mid, reasons, _properties):
        """Say that all is well; where the topic is refused, ask a second later."""
        if any(reason.is_failure for reason in reasons):
            what = f'topic "{topic}" to mqtt_username'
            say("broker", log.error, f"{self.name} refuses {what}")
            sleep(1)  # holds up paho's thread, which has nothing to receive yet
            self.subscribe(topic)
        else:
            self.subscribed = now()
            what = f'connected to {self.name}, waiting for "{topic}"'
            say("broker", log.info, what)

    def on_connect_fail(self, _client, _userdata):
        """Say why the broker cannot be reached, and what to check."""
        error = sys.exc_info()[1]  # paho calls this in its except block
        write = log.warning
        hint = "is it on, and in this network?"
        if mqtt_tls and isinstance(error, (ssl.SSLError, ConnectionResetError)):
            write = log.error
            hint = "check mqtt_tls, mqtt_port, mqtt_ca_file and mqtt_server"
        elif isinstance(error, ConnectionRefusedError):
            hint = "is it started, does it let other computers in (README, The broker)?"
        elif isinstance(error, socket.gaierror):
            hint = "check mqtt_server"
        what = f"cannot reach {self.name} ({error}), trying again: {hint}"
        say("broker", write, what)

    def on_disconnect(self, _client, _userdata, _flags, reason, _properties):
        """Say that the broker closed the connection, unless it refused the login."""
        was_closed_here = not reason.is_failure  # paho's word for our disconnect()
        was_refused = self.login is not None and self.login.is_failure
        if was_closed_here or was_refused:
            return
        hint = "check mqtt_port and mqtt_tls"
        if self.login is not None:
            hint = "connecting again"
        say("broker", log.warning, f"{self.name} closed the connection: {hint}")

    def doubt_topic(self):
        """Say it if nothing at all has come on the topic since the start."""
        if self.has_message or self.subscribed is None or not self.is_connected():
            return
        if now() - self.subscribed >= NO_MESSAGE:
            what = f'nothing came yet on "{topic}", is that the right topic? '
            what += "All that the broker gets is shown by: mosquitto_sub -v -t '#' "
            what += "(with -h, -u and -P as you need them)"
            say("topic", log.warning, what)

    def publish_status(self, status):
        """Publish the status if it is a new one, and again after STATUS_EVERY."""
        if not status_topic or not self.is_connected():
            return
        # Again, because a script that was killed may have left a session at the broker:
        # when that times out, its will, "offline", replaces our status.
        age = now() - self.status_time
        if status != self.last_status or age >= STATUS_EVERY:
            self.has_status = True
            self.last_status = status
            self.status_time = now()
            self.publish(status_topic, status, retain=True)

    def say_goodbye(self):
        """Log off, with "offline" as the last status."""
        if self.has_status:  # a second script, which never had the adapter, has none
            self.publish(status_topic, "offline", retain=True)
        self.disconnect()


# --- Modbus: the line. Frames by the Modbus Application Protocol V1.1b3, chapter 6 ----
MIN_FRAME = 4  # bytes
MAX_FRAME = 256  # bytes
PAUSE = 0.2  # s without a byte, after which a new burst of bytes begins
READ_TIMEOUT = 60  # s without a read after which the heat pump counts as not reading


class Frame(NamedTuple):
    """A whole frame with a good CRC."""

    raw: bytes  # unit id, function code, data and CRC
    is_answer: bool

    @property
    def unit(self):
        """The unit id that is asked or answers; 0 is a broadcast."""
        return self.raw[0]

    @property
    def function(self):
        """The function code; above 128 it is that of an exception."""
        return self.raw[1]

    @property
    def pdu(self):
        """The function code and its data: what is the same on any kind of Modbus."""
        return self.raw[1:-2]

    @property
    def asks_us(self):
        """Whether it is a request to our unit id."""
        return self.unit == unit_id and not self.is_answer


def has_good_crc(data):
    """Return whether data end with their CRC: then the CRC over all of it is 0."""
    return FramerRTU.compute_CRC(data) == 0


def possible_frames(data):
    """Return (size in bytes, whether it is an answer) of frames that data may begin with.

    The sizes are those of the Modbus Application Protocol, in the order to try them.
    """
    function = data[1]
    if function in (1, 2, 3, 4):
        byte_count = data[2]  # of an answer; a request has the high byte of its address
        # No answer has 0 data bytes. One with 3 is as long as a request: taken for one.
        if byte_count in (0, 3):
            return [(8, False)]
        # The answer first, as it may begin like a request: see Handler.is_own_echo().
        return [(5 + byte_count, True), (8, False)]
    if function in (5, 6):
        return [(8, False)]  # an answer is the very same bytes
    if function == WRITE and len(data) > 6:
        byte_count = data[6]  # of a request
        return [(8, True), (9 + byte_count, False)]
    if function > 0x80 and data[2] <= 11:  # an exception; the highest code is 11
        return [(5, True)]
    return []


def first_frame(data):
    """Return the Frame that data begin with, or None; data have MIN_FRAME or more."""
    for size, is_answer in possible_frames(data):
        if size <= len(data) and has_good_crc(data[:size]):
            return Frame(data[:size], is_answer)
    return None


def is_request_of_unknown_size(data):
    """Return whether data as a whole are a request to us whose size nothing tells.

    That is one of functions 7 to 127; a whole WRITE has been found before. Such a request
    gets its exception, and the diagnosis can name it.
    """
    if not MIN_FRAME <= len(data) <= MAX_FRAME or data[0] != unit_id:
        return False
    return 7 <= data[1] <= 127 and has_good_crc(data)


def find_frames(data):
    """Return a list of all Frames in data, and the bytes left behind the last one.

    These may be noise and the beginning of a frame: the last MAX_FRAME of them are kept.
    """
    frames = []
    start = 0  # where a frame may begin
    while start + MIN_FRAME <= len(data):
        frame = first_frame(data[start : start + MAX_FRAME])
        if frame:
            frames.append(frame)
            data = data[start + len(frame.raw) :]
            start = 0
        else:
            start += 1  # noise may come before a frame
    if is_request_of_unknown_size(data):
        return [*frames, Frame(data, is_answer=False)], b""
    return frames, data[-MAX_FRAME:]


class SerialSettings(NamedTuple):
    """How bytes are sent: bit/s, "E", "O" or "N" for the parity, 1 or 2 stop bits."""

    baudrate: int
    parity: str
    stopbits: int

    def __str__(self):
        return f"{self.baudrate} bit/s 8{self.parity}{self.stopbits}"


ALL_SETTINGS = [
    SerialSettings(rate, letter, 1) for rate in BAUDRATES for letter in "ENO"
]


class Line:
    """All that is known of the line: the main thread notes it, look_after() asks.

    There is no lock, as what is asked for changes in one step each.
    """

    def __init__(self):
        # The serial settings:
        self.configured = SerialSettings(baudrate, parity, stopbits)
        self.settings = self.configured  # those in use
        others = [one for one in ALL_SETTINGS if one != self.configured]
        self.to_try = cycle([*others, self.configured])  # a round ends with those
        self.good_frames = 0  # with the settings in use; exception frames do not count
        self.proven = False  # whether those in use are right: then they stay for good
        # What came:
        self.left = b""  # bytes that belong to no frame yet
        self.last_byte = None  # s, when it came; None = never
        self.proof = None  # the Frame that proved the settings, if it is to be answered
        # The heat pump:
        self.last_read = None  # s, when it read the meter; None = never
        self.refused = None  # the last of its requests that was refused, as bytes
        self.asked = set()  # unit ids of others that are asked as a meter would be
        self.answering = set()  # unit ids of those that answer
        # The adapter:
        self.opened = None  # s, when it was opened; None = it is not open
        self.is_taken = False  # whether another program has it

    def hear(self, data):
        """Take bytes that came. Return the last Frame in them if it asks us, or None."""
        if self.last_byte is not None and now() - self.last_byte > PAUSE:
            self.left = b""  # no frame has a pause in it
        self.last_byte = now()
        frames, self.left = find_frames(self.left + data)
        for frame in frames:
            self.note(frame)
        if frames and frames[-1].asks_us:  # it is too late to answer those before
            return frames[-1]
        return None

    def note(self, frame):
        """Note what a frame says. One to us, or two good ones, prove the settings."""
        if frame.is_answer:
            self.answering.add(frame.unit)
        elif frame.function in (3, 4) and 1 <= frame.unit <= 247:
            self.asked.add(frame.unit)
        if frame.function < 0x80:  # chance makes an exception's five bytes too easily
            self.good_frames += 1
        if frame.asks_us or self.good_frames >= 2:
            self.proven = True

    def try_next_settings(self):
        """Go on to the next serial settings; the configured ones end a round."""
        self.settings = next(self.to_try)
        self.good_frames = 0
        self.asked.clear()  # by frames that chance made
        self.answering.clear()
        if self.settings == self.configured:
            say("round", log.warning, "no serial settings fit: swap A and B")

    def note_open(self):
        """Note that the adapter is open, and say so."""
        say("adapter", log.info, f"the meter is on the line: {serial_port}")
        self.is_taken = False
        if self.opened is None:  # the search opens it again and again
            self.opened = now()

    def note_fault(self, is_taken):
        """Note that the adapter cannot be opened, or got lost."""
        self.is_taken = is_taken
        self.opened = None

    def note_misfit(self):
        """Note a burst without a good frame: noise makes one at times, not two in a row."""
        self.good_frames = 0

    def note_refused(self, pdu):
        """Note a request to us that was refused."""
        self.refused = pdu

    def note_read(self):
        """Note that the heat pump reads the meter."""
        self.last_read = now()

    def is_read(self):
        """Return whether the heat pump reads the meter."""
        return self.last_read is not None and now() - self.last_read < READ_TIMEOUT

    def could_be_read(self):
        """Return whether the adapter has been open for READ_TIMEOUT or more."""
        opened = self.opened  # once, as the main thread may set it to None meanwhile
        return opened is not None and now() - opened >= READ_TIMEOUT

    def diagnosis(self):
        """Return a sentence on why the heat pump does not read."""
        if self.last_read is not None:
            hint = "(Serial settings are searched only at the start.)"
            return f"it stopped asking: is it on, are all wires in? {hint}"
        if self.refused is not None:
            return f"the meter refuses what it asks: {self.refused.hex(' ')}"
        in_vain = sorted(self.asked - self.answering - {unit_id})
        if in_vain:
            units = " or ".join(map(str, in_vain))
            return f"other units are asked in vain: set unit_id = {units}"
        if self.proven:
            return "it does not ask for a meter: switch it on in its settings"
        if self.last_byte is not None:
            return "no frame fits: trying other serial settings; swap A and B?"
        return "nothing came: check wires A and B, adapter, the pump's settings"

    def report(self):
        """Return when the heat pump read last."""
        if self.last_read is None:
            return "the heat pump has not read yet"
        return f"the heat pump read {now() - self.last_read:.0f} s ago"


# ------------------- Listen first: the heat pump's serial settings --------------------
# A burst is what comes without a PAUSE. It is a misfit if there is no good frame in it.
PATIENCE = 20  # s of misfits, after which the configured serial settings are given up
BURST_LIMIT = 1  # s; noise, or a poll each 0.1 s, may have no PAUSE at all
# A UART takes a start bit for real only if the line is still low half a bit later, so it
# hears nothing of what is much faster. At 19200 all up to 115200 is heard as something.
HEARS_ALL = 19200  # bit/s
SILENCE = 60  # s without a byte, after which slower settings are given up


class Burst(Enum):
    """What came until a PAUSE."""

    NOTHING = 0
    GOOD = 1
    MISFIT = 2


class NoParityError(OSError):
    """The adapter cannot do the parity that it was opened with."""


def turn_on_parity_check(port):
    """Let the kernel check each byte's parity, which pyserial's open turns off.

    A byte with a wrong one then arrives as 0; without it the search could not tell even
    from odd. Raises NoParityError where the port has none: a pseudo terminal takes the
    setting silently, and drops it.
    """
    iflag, oflag, cflag, *more = termios.tcgetattr(port.fd)
    if port.parity != "N" and not cflag & termios.PARENB:
        raise NoParityError(errno.EINVAL, "no parity")
    attributes = [iflag | termios.INPCK, oflag, cflag, *more]
    termios.tcsetattr(port.fd, termios.TCSANOW, attributes)


def open_port(settings):
    """Return the adapter, opened with some serial settings and for us alone.

    Raises NoParityError where it has no parity; else OSError or termios.error.
    """
    arguments = settings._asdict()
    try:
        port = serial.Serial(serial_port, exclusive=True, timeout=PAUSE, **arguments)
    except termios.error as error:  # (number, text)
        if settings.parity != "N" and error.args[0] == errno.EINVAL:
            raise NoParityError(*error.args) from error
        raise
    try:
        turn_on_parity_check(port)
        port.reset_input_buffer()  # what came before was not checked
    except Exception:
        port.close()
        raise
    return port


def hear_burst(port, line):
    """Hear what comes until a PAUSE, and return what kind of Burst it was.

    It ends early when the settings are proven, or after BURST_LIMIT.
    """
    kind = Burst.NOTHING
    frames_before = line.good_frames
    byte = port.read()  # b"" after a PAUSE
    begin = now()
    while byte:
        data = byte + port.read(port.in_waiting)
        log.debug("recv: %s at %s", " ".join(map(hex, data)), line.settings)
        line.proof = line.hear(data)
        kind = Burst.GOOD if line.good_frames > frames_before else Burst.MISFIT
        if line.proven or now() - begin > BURST_LIMIT:
            break
        byte = port.read()
    if kind == Burst.MISFIT:
        line.note_misfit()
    return kind


def listen(port, line):
    """Listen until the line's serial settings are proven, given up, or a stop."""
    may_be_deaf = line.settings.baudrate < HEARS_ALL
    patience = PATIENCE if line.settings == line.configured else 0  # s
    first_misfit = None  # s, when the first misfit in a row came
    last_burst = now()
    hear_burst(port, line)  # of one that began before the opening, a part is missing
    while not line.proven and not stopping:
        burst = hear_burst(port, line)
        if burst == Burst.MISFIT:
            last_burst = now()
            if first_misfit is None:
                first_misfit = now()
            if now() - first_misfit >= patience:
                return
        elif burst == Burst.GOOD:
            last_burst = now()
            first_misfit = None
        elif now() - last_burst >= SILENCE:
            first_misfit = None  # a misfit before it was stray noise
            if may_be_deaf:
                return


def try_settings(line):
    """Listen with the line's serial settings, unless the adapter cannot do them.

    Raises OSError or termios.error when the adapter cannot be opened or gets lost.
    """
    try:
        port = open_port(line.settings)
    except NoParityError:
        text = (
            f"the adapter {serial_port} has no parity: a heat pump with even or odd "
            "parity needs another one (on a Raspberry Pi the full UART: "
            "dtoverlay=disable-bt)"
        )
        say("parity", log.warning, text)
        return
    line.note_open()
    try:
        listen(port, line)
    except OSError as error:  # pyserial's, in which the number is mostly missing
        raise OSError(errno.ENODEV, "lost") from error
    finally:
        port.close()


def search(line):
    """Try one serial setting after another, until some are proven or a stop.

    Raises OSError or termios.error when the adapter cannot be opened or gets lost.
    """
    try_settings(line)
    while not line.proven and not stopping:
        line.try_next_settings()
        try_settings(line)
    if line.proven and line.settings != line.configured:
        text = 'set baudrate = {}, parity = "{}", stopbits = {}'.format(*line.settings)
        log.info("the heat pump speaks %s: %s", line.settings, text)


# ----------------------------- Then serve: bytes to answers ---------------------------
class Handler(ServerRequestHandler):
    """Our way from the bytes of the line to answers, in place of pymodbus's.

    Its own forgets a request when a byte follows it, loses those behind the frames of
    others, and answers what others are asked. This one relies on the inside of pymodbus
    3.16.1, so requirements.txt pins that, and test_powermeter.py would show a change:

    - callback_connected() is called when the adapter is open, callback_data() for each
      read, unless that has more than max_buffer_size bytes; it returns how many it used
    - is_active() becomes False when the adapter is lost, and server.shutdown() lets
      StartSerialServer() return
    - framer.decoder.decode() makes an object of a request, datastore_update() of that
      makes a response from the server's device, and pdu_send() sends that by send()

    What else is relied on: the list of Meter.build_device() is served itself, no copy, and
    read as one slice; run_server() replaces a method; FramerRTU.compute_CRC().
    """

    def __init__(self, server, meter, line):
        super().__init__(server, trace_packet=None, trace_pdu=None, trace_connect=None)
        self.max_buffer_size = 1024  # bytes, what a read brings at most
        self.meter = meter
        self.line = line
        self.sent = b""  # our last frame
        # Tasks are kept by these names, as asyncio itself keeps none:
        self.end_task = None  # end_server()
        self.answer_task = None  # the newest answer()

    def callback_connected(self):
        """Begin to serve, with the request that proved the settings if it is new."""
        self.end_task = asyncio.create_task(self.end_server())
        self.line.note_open()
        request, self.line.proof = self.line.proof, None
        if request is not None and now() - self.line.last_byte < PAUSE:
            self.answer_soon(request)

    def callback_data(self, data, addr=None):
        """Take bytes that came, all of them, and answer a request."""
        request = self.line.hear(data)
        if request is not None and not self.is_own_echo(request):
            self.answer_soon(request)
        return len(data)

    def is_own_echo(self, frame):
        """Return whether a Frame is the beginning of what we sent, heard back.

        Some adapters hear themselves. The CRC of an answer whose last byte is 0 is good
        without it, so 8 bytes of an answer with 9 look like a request while the last is
        still to come. No real one looks so: its address would be 1024 or more.
        """
        return self.sent.startswith(frame.raw)

    def answer_soon(self, request):
        """Answer a Frame before the next read; asyncio logs an error in the answer."""
        self.answer_task = asyncio.create_task(self.answer(request))

    async def end_server(self):
        """End the server at a stop, or when the adapter is lost."""
        while self.is_active() and not stopping:
            await asyncio.sleep(TICK)
        await self.server.shutdown()

    async def answer(self, request):
        """Answer a Frame that asks us: from the datastore, or with an exception."""
        self.meter.drop_old_value()  # so that not even one answer shows it
        code = refusal(request.pdu)
        if code:
            self.line.note_refused(request.pdu)
            self.pdu_send(ExceptionResponse(request.function, code, unit_id))
            return
        if request.function == READ:
            self.line.note_read()
        pdu = self.framer.decoder.decode(request.pdu)
        response = await pdu.datastore_update(self.server.context, unit_id)
        response.dev_id = unit_id
        self.pdu_send(response)

    def send(self, data, addr=None):
        """Send a frame, and keep it to know its echo."""
        self.sent = data
        super().send(data, addr)


def run_server(meter, line):
    """Serve the meter until a stop.

    Raises OSError, termios.error or (pymodbus) RuntimeError when the adapter cannot be
    opened or gets lost.
    """
    open_port(line.settings).close()  # pymodbus would not tell why it cannot open it
    meter.show_baudrate(line.settings.baudrate)

    def new_handler(server):
        return Handler(server, meter, line)

    # StartSerialServer() takes no class of a server or handler. It makes a
    # ModbusSerialServer, which makes its handler by this method.
    ModbusSerialServer.callback_new_connection = new_handler
    StartSerialServer(meter, port=serial_port, **line.settings._asdict())
    if not stopping:
        raise OSError(errno.ENODEV, "lost")


def adapter_fault(error, number):
    """Return (what is wrong with the adapter, what to do) for an error and its errno."""
    if number in (errno.ENOENT, errno.ENODEV):
        plugged_in = ", ".join(sorted(glob.glob("/dev/serial/by-id/*")))
        return "is not there", f"plugged in: {plugged_in or 'none with USB'}"
    if number == errno.EAGAIN:
        hint = "a second powermeter.py? See: screen -ls, systemctl status powermeter"
        return "is in use by another program", hint
    if number == errno.EACCES:
        group = device_group()
        if group == "tty":
            return "may not be opened", "a serial console has it: switch that off"
        return "may not be opened", f"add your user to the group {group}"
    return f"fails: {error}", "is it a serial adapter?"


def device_group():
    """Return the group of the adapter's device, whose users may open it."""
    try:
        return grp.getgrgid(os.stat(serial_port).st_gid).gr_name
    except (KeyError, OSError):  # a group without a name; pulled in this moment
        return "dialout"


def serve(meter, line):
    """Search the serial settings, then serve with them, until a stop."""
    while not stopping:
        try:
            if not line.proven:
                search(line)
            if line.proven:
                run_server(meter, line)
        except (OSError, RuntimeError, termios.error) as error:
            number = getattr(error, "errno", None)  # only an OSError has one
            fault, hint = adapter_fault(error, number)
            line.note_fault(is_taken=number == errno.EAGAIN)
            text = f"the adapter {serial_port} {fault}: trying every second ({hint})"
            say("adapter", log.warning, text)
            sleep(1)


# ------------------------------- What is due by time ----------------------------------
def look_after(broker, meter, line):
    """Do what is due by time, each TICK until a stop; a thread of its own."""
    reported = now()
    while not stopping:
        try:
            broker.loop_start()  # does nothing while paho's thread runs
            meter.drop_old_value()
            broker.doubt_topic()
            is_read = line.is_read()
            if not line.is_taken:  # who has the adapter, publishes the status
                broker.publish_status("online" if is_read else "no heat pump")
            if is_read:
                text = f"the heat pump reads the meter, unit {unit_id}"
                say("heat pump", log.info, text)
            elif line.could_be_read():
                text = f"the heat pump has not read for {READ_TIMEOUT} s: "
                say("heat pump", log.warning, text + line.diagnosis())
            if now() - reported >= REPORT_EVERY:
                reported = now()
                log.info("%s; %s", meter.report(), line.report())
        except Exception as error:  # noqa: BLE001, all else has to go on
            say("error", log.exception, f"going on after an error: {error!r}")
        sleep(TICK)


def ask_to_stop(_number, _frame):
    """Ask all loops to end; the handler of SIGINT and SIGTERM."""
    global stopping
    stopping = True


def start_log():
    """Write the log to the terminal, by a thread of its own.

    Ctrl-S in a terminal holds up whoever writes to it: now that is only this thread,
    and when its queue is full, lines are dropped.
    """
    lines = queue.Queue(maxsize=1000)
    layout = "%(asctime)s %(levelname)s %(message)s"
    QueueListener(lines, logging.StreamHandler(sys.stdout)).start()
    logging.basicConfig(level=log_level, handlers=[QueueHandler(lines)], format=layout)
    logging.raiseExceptions = False  # else each dropped line prints a traceback
    # At a pulled adapter pymodbus logs errors of its own, beside our line that says it.
    logging.getLogger("pymodbus.logging").disabled = log_level != "DEBUG"


def main():
    """Carry the value from the broker to the line, until Ctrl-C or SIGTERM."""
    check_settings()
    for number in (signal.SIGINT, signal.SIGTERM):  # KeyboardInterrupt could get lost
        signal.signal(number, ask_to_stop)
    start_log()
    log.info("powermeter.py starts")
    meter = Meter()
    broker = Broker(meter)
    line = Line()
    parts = (broker, meter, line)
    watch = threading.Thread(target=look_after, args=parts, daemon=True)
    watch.start()
    serve(meter, line)
    watch.join(1)  # s, or it might publish another status behind "offline"
    broker.say_goodbye()
    sleep(0.5)  # for the threads to send and write what is left
    os._exit(0)  # a stopped terminal would hold up a normal end for ever


if __name__ == "__main__":
    main()
