"""Viessmann's energy meter, a rebranded Saia-Burgess ALE3, emulated on RS-485.

    restPower = hpPower - gridPower    W left for the heat pump; gridPower < 0: feed-in
    MQTT broker -> Broker.on_message -> Meter.registers -> pymodbus -> heat pump

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
import logging
import os
import queue
import re
import signal
import ssl
import struct
import sys
import termios
import threading
from collections import namedtuple
from functools import partial
from itertools import cycle
from logging.handlers import QueueHandler, QueueListener
from subprocess import DEVNULL, run
from time import CLOCK_BOOTTIME, clock_gettime, sleep

import serial
from paho.mqtt.client import CallbackAPIVersion, Client
from pymodbus.constants import ExcCodes
from pymodbus.framer import FramerRTU
from pymodbus.pdu import ExceptionResponse
from pymodbus.server import ServerAsyncStop, StartSerialServer, base
from pymodbus.simulator import DataType, SimData, SimDevice

READ_TIMEOUT = 60  # s without a read after which the heat pump counts as not reading
PATIENCE = 20  # s of bytes without a good frame until other settings are tried
TICK = 0.2  # s between two calls of look_after()
PAUSE = 0.2  # s without a byte, after which a new burst of bytes begins
MIN_FRAME, MAX_FRAME, MAX_READ = 4, 256, 1024  # bytes, of a frame, of a serial read
BAUDRATES = (19200, 9600, 38400, 115200, 57600, 4800, 2400, 1200)  # likely ones first
SerialSettings = namedtuple("SerialSettings", "baudrate parity stopbits")
ALL_SETTINGS = [SerialSettings(b, p, 1) for b in BAUDRATES for p in "ENO"]
LOG_LEVELS = ("DEBUG", "INFO", "WARNING", "ERROR")
# A plain number; float() alone would take nan, 1_000 and other alphabets' digits too.
NUMBER = re.compile(r"\s*[+-]?(\d+(\.\d*)?|\.\d+)([eE][+-]?\d+)?\s*", re.ASCII)
ADAPTER_FAULTS = {
    errno.ENOENT: "is not there",
    errno.ENODEV: "is not there",
    errno.EACCES: "may not be opened, add your user to the group dialout",
    errno.EAGAIN: "is in use by another program",
}
now = partial(clock_gettime, CLOCK_BOOTTIME)  # s, goes on while a computer sleeps
log = logging.getLogger("powermeter")
last_said = {}  # subject (a text, or the Broker): the last text that say() wrote on it
orders = []  # Ctrl-C and SIGTERM add "stop", on which the main thread ends the script


def say(subject, write, text):
    """Write a line by a method of log, unless it was the last on its subject."""
    if last_said.get(subject) != text:
        last_said[subject] = text
        write(text)


def is_host(name):
    """Return whether name can be a host name or an IP address, without a port."""
    name.encode("idna")  # raises a UnicodeError for a name that cannot be looked up
    has_port = name.count(":") == 1  # an IPv6 address has more colons
    return name != "" and not has_port and not set(name) & set("/[ \0")


def check_settings():
    """End the script with status 2 and one line where a setting cannot work."""
    text, whole, number, login = (str,), (int,), (int, float), (str, int)
    plain = set("+#\0").isdisjoint  # plain(v): v has none of these three characters
    load_ca = ssl.create_default_context  # raises OSError for a file without a CA
    rows = (  # name, types, test (an error is a no as well), what it may be
        ("topic", text, lambda v: v and plain(v), "a topic without + and #"),
        ("mqtt_server", text, is_host, "a host name or an IP address, without a port"),
        ("mqtt_port", whole, lambda v: 1 <= v <= 65535, "1 to 65535"),
        ("mqtt_username", login, lambda v: True, "a text, or '' for none"),
        ("mqtt_password", login, lambda v: True, "a text, or '' for none"),
        ("mqtt_tls", (bool,), lambda v: True, "True or False"),
        ("mqtt_ca_file", text, lambda v: not v or load_ca(cafile=v), "'' or a CA file"),
        ("max_age", number, lambda v: v >= 0, "a number of seconds, or 0"),
        ("status_topic", text, lambda v: v != topic and plain(v), "a different topic"),
        ("serial_port", text, lambda v: v and "\0" not in v, "the path of a device"),
        ("baudrate", whole, lambda v: v in BAUDRATES, sorted(BAUDRATES)),
        ("parity", text, lambda v: v in ("E", "O", "N"), "'E', 'O' or 'N'"),
        ("stopbits", whole, lambda v: v in (1, 2), "1 or 2"),
        ("unit_id", whole, lambda v: 1 <= v <= 247, "1 to 247"),
        ("surplus_sign", whole, lambda v: v in (1, -1), "1 or -1"),
        ("log_level", text, lambda v: v in LOG_LEVELS, LOG_LEVELS),
    )
    for name, types, can_work, allowed in rows:
        value = globals().get(name)
        try:
            is_fine = type(value) in types and can_work(value)  # True is no int here
        except (OSError, ValueError):  # from load_ca() or is_host()
            is_fine = False
        if not is_fine:  # as in: unit_id = '60' cannot work in quotes, it may be: ...
            fault = f"= {value!r} cannot work" if name in globals() else "is missing"
            quotes = " in quotes" if type(value) is str and str not in types else ""
            print(f"{name} {fault}{quotes}, it may be: {allowed}", file=sys.stderr)
            sys.exit(2)


# ------------------- The meter: Saia-Burgess ALE3, datasheet 26-527 -------------------
VOLTAGE, MAX_WATTS = 230, 327670  # V, W; R51 holds at most 32767 times 10 W
REGISTERS, MAX_COUNT = 52, 20  # R1 to R52, wire addresses 0 to 51; at most in a read
READ, WRITE = 3, 16  # its function codes: Read Holding and Write Multiple Registers


def meter_registers(watts, rate):
    """Return R1 to R52 (16 bits each) for a rest power in W and a baudrate in bit/s."""
    current = round(abs(watts) / 3 / VOLTAGE * 10)  # 0.1 A per phase
    power = (surplus_sign * round(watts / 30)) & 0xFFFF  # 10 W per phase, signed
    phase = (VOLTAGE, current, power, 0, 100)  # V, 0.1 A, 10 W, 10 var, cos phi in 0.01
    return [
        *(11, REGISTERS, 0),  # R1-3 firmware version 1.1, number of registers, of flags
        *(*divmod(rate, 0x10000), 0),  # R4-5 baudrate, bit/s, R6 not used
        *struct.unpack(">8H", b"ALE3D5FD10C2A00\0"),  # R7-14 type
        *(11, 0, 0, 1, 0, 0, 0),  # R15 hardware 1.1, R16-18 serial no., R19-21 not used
        *(0, 60),  # R22 status, 0 = no problem, R23 response timeout, ms
        *(unit_id, 0, 0, 0),  # R24 Modbus address, R25-27 errors, not used, tariff
        *[0] * 8,  # R28-35 energy, 0.01 kWh; 0, as counts would be lost at restarts
        *(phase * 3),  # R36-50 phases 1 to 3
        *((surplus_sign * round(watts / 10)) & 0xFFFF, 0),  # R51-52 total, 10 W, 10 var
    ]


def refusal(request):
    """Return the exception code for a request (its function code first), or None."""
    if request[0] not in (READ, WRITE):
        return ExcCodes.ILLEGAL_FUNCTION
    if request[0] == READ:
        wire_address, count = struct.unpack(">HH", request[1:])  # a READ comes whole
        fits = 1 <= count <= MAX_COUNT and wire_address + count <= REGISTERS
        return None if fits else ExcCodes.ILLEGAL_ADDRESS  # the datasheet's code
    if len(request) < 6:  # a WRITE may be cut short before its values
        return ExcCodes.ILLEGAL_VALUE
    wire_address, count, byte_count = struct.unpack(">HHB", request[1:6])
    if count == 0 or byte_count != 2 * count or byte_count != len(request) - 6:
        return ExcCodes.ILLEGAL_VALUE
    if (wire_address + 1, count) not in ((30, 2), (34, 2)):  # only these can be reset
        return ExcCodes.ILLEGAL_ADDRESS
    return ExcCodes.ILLEGAL_VALUE if any(request[6:]) else None  # only zeros: a reset


class Meter(SimDevice):
    """pymodbus's datastore: paho's thread writes it, each server in turn reads it."""

    def __init__(self):
        super().__init__(unit_id, SimData(0, REGISTERS, datatype=DataType.REGISTERS))
        self.built = super().build_device()
        _address, self.registers, _types = self.built
        self.lock = threading.Lock()  # the main thread writes too: 0 W for an old value
        self.baudrate = baudrate  # in use, bit/s; serve() sets it
        self.too_old = False  # whether 0 W are served, as the rest power is too old
        self.update(0.0)

    def build_device(self):
        """Give every server the same registers: each calls this when it starts."""
        return self.built

    def update(self, watts=None):
        """Take watts, if given; write the registers, for 0 W if that is too old."""
        with self.lock:
            if watts is not None:
                self.watts, self.arrival = watts, now()
            was_too_old = self.too_old
            self.too_old = max_age > 0 and now() - self.arrival > max_age
            self.served = 0.0 if self.too_old else self.watts
            # One assignment: a read sees all the old or all the new ones, no mixture.
            self.registers[:REGISTERS] = meter_registers(self.served, self.baudrate)
        if self.too_old and not was_too_old:
            log.warning("no rest power for %g s: serving 0 W until one comes", max_age)


# -------------------------- MQTT: where the value comes from --------------------------
class Broker(Client):
    """The connection to the MQTT broker; paho's thread calls the methods on_..."""

    def __init__(self, meter):
        client_id = f"powermeter-{os.urandom(4).hex()}"  # random, but kept for relogins
        super().__init__(CallbackAPIVersion.VERSION2, client_id)
        self.meter = meter
        self.name = f"the MQTT broker {mqtt_server}:{mqtt_port}"
        self.if_closed = ""  # what on_disconnect() says, "" = nothing
        self.heard = set()  # all rest powers so far, rounded to 10 W: 65,535 at most
        self.last_status = ""  # the last that was published in this session
        self.reconnect_delay_set(1, 10)  # s between two tries
        self.username_pw_set(str(mqtt_username) or None, str(mqtt_password) or None)
        if mqtt_tls:
            self.tls_set(mqtt_ca_file or None)
        if status_topic:
            self.will_set(status_topic, "offline", retain=True)
        self.connect_async(mqtt_server, mqtt_port, keepalive=10)  # s

    def on_message(self, _client, _userdata, message):
        """Write the rest power into the datastore; 0 W where it cannot be trusted."""
        raw = message.payload.decode(errors="replace")
        if not NUMBER.fullmatch(raw) or abs(float(raw)) > MAX_WATTS:
            self.meter.update(0.0)
            log.error("%a is no rest power in W: serving 0 W until one comes", raw[:80])
            return
        watts = float(raw)
        # A retained value comes at each login: taken as new only if never heard before.
        is_repeated = message.retain and round(watts / 10) in self.heard
        self.heard.add(round(watts / 10))
        if not is_repeated:
            self.meter.update(watts)
            log.info("rest power %g W: %d W per phase", watts, round(watts / 3))
        elif watts == self.meter.watts:  # the last one: it stays, and its age goes on
            log.info("rest power %g W again: serving %g W", watts, self.meter.served)
        else:  # an earlier one, to 10 W: nobody knows its age
            self.meter.update(0.0)
            log.info("rest power %g W again: serving 0 W", watts)

    def on_pre_connect(self, _client, _userdata):
        """Set what on_disconnect() says of a broker that closes without an answer."""
        self.if_closed = "closed the connection: check mqtt_port and mqtt_tls"

    def on_connect(self, _client, _userdata, _flags, reason, _properties):
        """Subscribe, anew at each login; or say that the broker refuses it."""
        if reason.is_failure:
            self.if_closed = ""  # the line below says why
            what = f"the login, check mqtt_username and mqtt_password: {reason}"
            say(self, log.error, f"{self.name} refuses {what}")
        else:
            self.if_closed = "closed the connection: connecting again"
            self.subscribe(topic)
            self.last_status = ""  # so that look_after() publishes it

    def on_subscribe(self, _client, _userdata, _mid, reasons, _properties):
        """Say that all is well; where the topic is refused, ask a second later."""
        if any(reason.is_failure for reason in reasons):
            say(self, log.error, f"{self.name} refuses topic {topic} to mqtt_username")
            sleep(1)  # holds up paho's thread, which has nothing to receive yet
            self.subscribe(topic)
        else:
            say(self, log.info, f"connected to {self.name}, waiting for {topic}")

    def on_connect_fail(self, _client, _userdata):
        """Say why the broker cannot be reached."""
        error = sys.exc_info()[1]  # paho calls this in its except block
        write, hint = log.warning, "trying again"
        if mqtt_tls and isinstance(error, (ssl.SSLError, ConnectionResetError)):
            write = log.error
            hint = "check mqtt_tls, mqtt_port, mqtt_ca_file and mqtt_server"
        say(self, write, f"cannot reach {self.name} ({error}): {hint}")

    def on_disconnect(self, _client, _userdata, _flags, reason, _properties):
        """Say that the connection broke; nothing where it was ended here or refused."""
        if reason.is_failure and self.if_closed:
            say(self, log.warning, f"{self.name} {self.if_closed}")


# --- Modbus: the line. Frames by the Modbus Application Protocol V1.1b3, chapter 6 ----
def first_frame(data):
    """Return (frame, is an answer) of the good frame that data begins with, or None."""
    function, third = data[1], data[2]
    sizes = []  # (bytes, is an answer) of each frame that it could be
    if function in (1, 2, 3, 4):
        sizes = [(8, False), (5 + third, True)]  # third: number of data bytes
    elif function in (5, 6):
        sizes = [(8, False)]  # an answer is the very same bytes
    elif function == WRITE and len(data) > 6:
        sizes = [(8, True), (9 + data[6], False)]  # data[6]: number of bytes to write
    elif function > 0x80 and third < 12:
        sizes = [(5, True)]  # an exception; third is its code, below 12
    # A frame with its CRC has CRC 0, also with zeros behind it: so the shorter first.
    for size, is_answer in sorted(sizes):  # of two equal ones the request (False)
        if size <= len(data) and FramerRTU.compute_CRC(data[:size]) == 0:
            return data[:size], is_answer
    return None


def find_frames(data):
    """Return all good frames in data as (frame, is an answer), and the bytes left."""
    frames = []
    start = 0  # where the next frame is looked for
    end = 0  # where the last good frame ended
    while len(data) - start >= MIN_FRAME:
        found = first_frame(data[start : start + MAX_FRAME])
        if found:
            frames.append(found)
            start = end = start + len(found[0])
        else:
            start += 1  # noise may come before a frame
    left = data[end:]
    # All bytes left may be one request to us whose size is unknown: a WRITE cut short,
    # or another function. Functions 1 to 6 have known sizes: first_frame() knows them.
    is_intact = len(left) >= MIN_FRAME and FramerRTU.compute_CRC(left) == 0
    if is_intact and left[0] == unit_id and 6 < left[1] < 0x80:
        return [*frames, (left, False)], b""
    return frames, left[-MAX_FRAME:]


class Line:
    """What is known of the line and of the heat pump; it outlives the servers."""

    def __init__(self):
        self.own = SerialSettings(baudrate, parity, stopbits)  # of the settings block
        self.settings = self.own  # in use
        others = [one for one in ALL_SETTINGS if one != self.own]
        self.to_try = cycle([*others, self.own])  # the next, if those in use are wrong
        self.proven = False  # whether those in use are right; then they stay for good
        self.is_lost = False  # whether the adapter got lost while the last server ran
        self.alive = False  # whether any byte came
        self.last_read = -READ_TIMEOUT  # s; below 0 = never
        self.quiet_since = now()  # s; "has not read for 60 s" is counted from here
        self.refused = b""  # the first request to us that was refused
        self.asked, self.answering = set(), set()  # unit ids of others

    def note(self, frame, is_answer):
        """Note which other units are asked as a meter would be, and which answer."""
        unit, function = frame[0], frame[1]
        if is_answer:
            self.answering.add(unit)
        elif function in (3, 4) and 0 < unit < 248 and unit != unit_id:
            self.asked.add(unit)

    def diagnosis(self):
        """Return a sentence on why the heat pump does not read."""
        units = " or ".join(map(str, sorted(self.asked - self.answering)))
        reasons = (  # the first that is true
            (self.last_read > 0, "it stopped asking: is it on, are all wires in?"),
            (self.refused, f"the meter refuses what it asks: {self.refused.hex(' ')}"),
            (units, f"other units are asked in vain: set unit_id = {units}"),
            (self.proven, "it does not ask for a meter: switch it on in its settings"),
            (self.alive, "no frame fits: trying other serial settings; swap A and B?"),
            (True, "nothing came: check wires A and B, adapter, the pump's settings"),
        )
        reason = next(text for is_true, text in reasons if is_true)
        return f"the heat pump has not read for {READ_TIMEOUT} s: {reason}"


def look_after(broker, line):
    """Do all that is due by time; the main thread calls it each TICK."""
    try:
        broker.loop_start()  # starts paho's thread, also where an error has ended it
        broker.meter.update()
        if line.proven and line.settings != line.own:
            form = "the heat pump speaks {baudrate} bit/s 8{parity}{stopbits}: set "
            form += 'baudrate = {baudrate}, parity = "{parity}", stopbits = {stopbits}'
            say("found", log.info, form.format(**line.settings._asdict()))
        reads = now() - line.last_read < READ_TIMEOUT
        status = "online" if reads else "no heat pump"
        if status_topic and broker.is_connected() and broker.last_status != status:
            broker.last_status = status
            broker.publish(status_topic, status, retain=True)
        if reads:
            say("heat pump", log.info, f"the heat pump reads the meter, unit {unit_id}")
        elif now() - line.quiet_since >= READ_TIMEOUT:
            say("heat pump", log.warning, line.diagnosis())
    except Exception as error:  # noqa: BLE001, the line has to be answered all the same
        say("error", log.exception, f"going on after an error: {error!r}")


class Handler(base.ServerRequestHandler):
    """A server's handler. pymodbus's own loses requests to us and answers others'."""

    def __init__(self, broker, line, *of_pymodbus):
        super().__init__(*of_pymodbus)
        self.max_buffer_size = MAX_READ  # else pymodbus drops reads of over 264 bytes
        self.broker, self.line = broker, line
        self.left = b""  # bytes that belong to no frame yet; each burst() empties it
        self.byte_came = False  # since burst() looked last
        self.good_frames = 0  # exception frames not counted; two prove the settings

    def callback_connected(self):
        """Begin to look after all; pymodbus calls this when the adapter is open."""
        asyncio.create_task(self.attend())  # first, so it runs even if the rest fails
        # pyserial turns the check of parity off: bytes with a wrong one would pass
        run(["stty", "-F", serial_port, "inpck"], stderr=DEVNULL, check=False)
        self.transport.sync_serial.reset_input_buffer()  # drops what came before stty

    async def attend(self):
        """Look after all each TICK; end the server when it has to end."""
        say("adapter", log.info, f"the meter is on the line: {serial_port}")
        search = asyncio.create_task(self.search())
        while self.is_active() and not search.done() and not orders:
            look_after(self.broker, self.line)
            await asyncio.sleep(TICK)
        self.line.is_lost = not self.is_active()
        if search.done() and not self.line.proven:
            self.line.settings = next(self.line.to_try)  # for the next server
            if self.line.settings == self.line.own:  # all the others have been tried
                say("round", log.warning, "no serial settings fit: swap A and B")
        await ServerAsyncStop()

    async def search(self):
        """Return when misfits (bursts without a good frame) show the settings wrong."""
        on_trial = self.line.settings != self.line.own  # then one misfit is enough
        misfits = []  # the times of those since the last good burst, s
        # The first burst may have begun before the server, amid a frame: no misfit.
        await self.burst(has_begun=True)
        while True:
            if await self.burst() or self.line.proven:
                misfits = []
                continue
            if misfits and now() - misfits[-1] > 3 * PATIENCE:
                misfits = []  # the last came long ago: they were stray noise
            misfits.append(now())
            if on_trial or misfits[-1] - misfits[0] >= PATIENCE:
                return

    async def burst(self, has_begun=False):
        """Wait for a burst (or the rest of one); return whether it had a good frame."""
        self.left, self.byte_came, before = b"", has_begun, self.good_frames
        while not self.byte_came:  # until its first byte, unless it has begun
            await asyncio.sleep(PAUSE)
        while self.byte_came:  # until a PAUSE without a byte
            self.byte_came = False
            await asyncio.sleep(PAUSE)
            if len(self.left) >= MAX_FRAME and not self.line.proven:
                break  # so much that fits no frame is noise, which may never pause
        return self.good_frames > before

    def callback_data(self, data, addr=None):
        """Take all bytes that came; answer if the last frame in them is for us."""
        self.byte_came = self.line.alive = True
        self.left += data
        if len(data) == MAX_READ and self.transport.sync_serial.in_waiting:
            return len(data)  # more waits: take all of it first
        frames, self.left = find_frames(self.left)
        for frame, is_answer in frames:
            self.line.note(frame, is_answer)
            self.good_frames += frame[1] < 0x80  # no exceptions: 5 bytes may be chance
        self.line.proven |= self.good_frames > 1
        if frames:
            frame, is_answer = frames[-1]  # it is too late to answer those before
            if frame[0] == unit_id and not is_answer:
                self.answer(frame[1:-2])
        return len(data)

    def answer(self, request):
        """Answer a request to us (from its function code on, without the CRC)."""
        self.line.proven = True  # a request to us proves the serial settings
        self.broker.meter.update()  # before each answer, so no value too old goes out
        if code := refusal(request):
            self.line.refused = self.line.refused or request
            self.pdu_send(ExceptionResponse(request[0], code, unit_id))
            return
        if request[0] == READ:
            self.line.last_read = self.line.quiet_since = now()
        self.last_pdu = self.framer.decoder.decode(request)
        self.last_pdu.dev_id = unit_id
        asyncio.create_task(self.handle_request())  # pymodbus's: it answers last_pdu


def serve(broker, line):
    """Run server after server until the stop, each with the line's present settings."""
    # pymodbus looks its handler's class up by this name for each server: now ours.
    base.ServerRequestHandler = partial(Handler, broker, line)
    while not orders:
        broker.meter.baudrate = line.settings.baudrate
        port = {"port": serial_port, **line.settings._asdict()}
        try:
            serial.Serial(exclusive=True, **port).close()  # its OSError tells the cause
            StartSerialServer(broker.meter, **port)  # until attend() ends it
            fault = "is not there" if line.is_lost else ""
        except (OSError, RuntimeError, termios.error) as error:  # args: [errno,] text
            fault = ADAPTER_FAULTS.get(error.args[0], f"fails: {error.args[-1]}")
        if fault:
            what = f"the adapter {serial_port} {fault}: trying every second"
            say("adapter", log.warning, what)
            if fault.startswith("fails") and not line.proven:
                line.settings = line.own  # the adapter may not support those on trial
            look_after(broker, line)
            sleep(1)
            line.quiet_since = now()  # the heat pump could not read: 60 s begin anew


def main():
    """Carry the value from the broker to the line, until Ctrl-C or SIGTERM."""
    check_settings()
    for number in (signal.SIGINT, signal.SIGTERM):  # KeyboardInterrupt could get lost
        signal.signal(number, lambda *_: orders.append("stop"))
    # Thanks to a queue, Ctrl-S stops only the listener; a full queue drops lines.
    lines, layout = queue.Queue(1000), "%(asctime)s %(levelname)s %(message)s"
    QueueListener(lines, logging.StreamHandler(sys.stdout)).start()
    logging.basicConfig(level=log_level, handlers=[QueueHandler(lines)], format=layout)
    logging.raiseExceptions = False  # else each dropped line prints a traceback
    logging.getLogger("pymodbus.logging").disabled = log_level != "DEBUG"
    log.info("powermeter.py starts")
    broker = Broker(Meter())
    serve(broker, Line())
    if status_topic:
        broker.publish(status_topic, "offline", retain=True)
    broker.disconnect()
    sleep(0.5)  # for the threads to send and write what is left
    os._exit(0)  # a stopped terminal would hold up a normal end for ever


if __name__ == "__main__":
    main()
