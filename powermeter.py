"""Viessmann's energy meter, a rebranded Saia-Burgess ALE3, emulated on RS-485.

    restPower = hpPower - gridPower      in W; gridPower < 0: power goes to the grid
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
status_topic = ""  # here it publishes whether the heat pump reads; "" = nowhere

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
from functools import cache, partial
from itertools import cycle
from logging.handlers import QueueHandler, QueueListener
from subprocess import DEVNULL, run
from time import CLOCK_BOOTTIME, clock_gettime, sleep

import serial
from paho.mqtt.client import CallbackAPIVersion, Client
from pymodbus.constants import ExcCodes
from pymodbus.framer import FRAMER_NAME_TO_CLASS, FramerRTU, FramerType
from pymodbus.pdu import DecodePDU, ExceptionResponse
from pymodbus.server import ServerAsyncStop, StartSerialServer
from pymodbus.simulator import DataType, SimData, SimDevice

READ_TIMEOUT = 60  # s without a read after which the heat pump counts as not reading
PATIENCE = 20  # s in which bytes come but no good frame, then other settings are tried
TICK = 0.2  # s between two calls of look_after(); a longer pause in a frame splits it
MAX_FRAME = 256  # bytes, the longest frame; find_frames() keeps no more than that
BAUDRATES = (19200, 9600, 38400, 115200, 57600, 4800, 2400, 1200)  # likely ones first
SerialSettings = namedtuple("SerialSettings", "baudrate parity stopbits")
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


def check_settings():
    """End the script with status 2 and one line where a setting cannot work."""

    def is_host(v):  # encode() raises if it cannot be one; a single ":" starts a port
        return v.encode("idna") and v.count(":") != 1 and not set(v) & set("/[ \0")

    text, whole, number, login = (str,), (int,), (int, float), (str, int)
    plain = set("+#\0").isdisjoint  # plain(v): no wildcard and no NUL in v
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
        except (OSError, ValueError):  # from load_ca() or encode()
            is_fine = False
        if not is_fine:  # like: unit_id = '60' cannot work in quotes, it may be: ...
            fault = f"= {value!r} cannot work" if name in globals() else "is missing"
            quotes = " in quotes" if type(value) is str and str not in types else ""
            print(f"{name} {fault}{quotes}, it may be: {allowed}", file=sys.stderr)
            sys.exit(2)


# ------------------- The meter: Saia-Burgess ALE3, datasheet 26-527 -------------------
VOLTAGE, MAX_WATTS = 230, 327670  # V, W; R51 holds at most 32767 times 10 W
REGISTERS, MAX_COUNT = 52, 20  # of the meter, and at most in one read
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
        (surplus_sign * round(watts / 10)) & 0xFFFF,  # R51 active power, total, 10 W
        0,  # R52 reactive power, total, 10 var
    ]


def refusal(request):
    """Return the exception code for a request (its function code first), or None."""
    function = request[0]
    if function not in (READ, WRITE):
        return ExcCodes.ILLEGAL_FUNCTION
    if function == READ:
        wire_address, count = struct.unpack(">HH", request[1:])  # READ: always 4 bytes
        fits = 1 <= count <= MAX_COUNT and wire_address + count <= REGISTERS
        return None if fits else ExcCodes.ILLEGAL_ADDRESS
    if len(request) < 6:  # cut short before its values begin
        return ExcCodes.ILLEGAL_VALUE
    wire_address, count, byte_count = struct.unpack(">HHB", request[1:6])
    if count == 0 or byte_count != 2 * count or byte_count != len(request) - 6:
        return ExcCodes.ILLEGAL_VALUE
    if (wire_address + 1, count) not in ((30, 2), (34, 2)):  # counters R30-31, R34-35
        return ExcCodes.ILLEGAL_ADDRESS
    return ExcCodes.ILLEGAL_VALUE if any(request[6:]) else None  # only zeros: a reset


class Meter(SimDevice):
    """pymodbus's datastore: paho's thread writes it, server after server reads it."""

    def __init__(self):
        super().__init__(unit_id, SimData(0, REGISTERS, datatype=DataType.REGISTERS))
        self.build_device = cache(self.build_device)  # not for speed: one list for all
        _address, self.registers, _types = self.build_device()  # the list they all read
        self.lock = threading.Lock()  # the main thread writes too: 0 W for an old value
        self.baudrate = baudrate  # in use, bit/s; run_server() sets it
        self.too_old = False  # whether 0 W are served, as the rest power is too old
        self.update(0.0)

    def update(self, watts=None):
        """Write the registers for watts (None: for the last ones), 0 W if too old."""
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
        self.heard = set()  # all rest powers so far, in units of 10 W; see on_message()
        self.last_status = ""  # the last that was published in this session
        self.reconnect_delay_set(1, 10)  # s between two tries
        self.username_pw_set(str(mqtt_username) or None, str(mqtt_password) or None)
        if mqtt_tls:
            self.tls_set(mqtt_ca_file or None)
        if status_topic:
            self.will_set(status_topic, "offline", retain=True)
        self.connect_async(mqtt_server, mqtt_port, keepalive=10)  # s

    def on_message(self, _client, _userdata, message):
        """Write the rest power into the datastore; 0 W where it cannot be right."""
        raw = message.payload.decode(errors="replace")
        if not NUMBER.fullmatch(raw) or abs(float(raw)) > MAX_WATTS:
            self.meter.update(0.0)
            log.error("%a is no rest power in W: serving 0 W until one comes", raw[:80])
            return
        watts = float(raw)
        # The broker sends its retained value at each login, however old it is.
        # - A value never heard before (rounded to 10 W) is taken as new.
        # - The last value (meter.watts) changes nothing, so its age runs on.
        # - Any other one may be old or published again: nobody knows, so 0 W.
        if message.retain and round(watts / 10) in self.heard:
            if watts != self.meter.watts:  # not the last one: its age is unknown
                self.meter.update(0.0)
            log.info("rest power %g W again: serving %g W", watts, self.meter.served)
            return
        self.heard.add(round(watts / 10))
        self.meter.update(watts)
        log.info("rest power %g W: %d W per phase", watts, round(watts / 3))

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


# -------- Modbus: frames, by the Modbus Application Protocol V1.1b3, chapter 6 --------
def first_frame(data, no_noise_before):
    """Return (frame, is an answer) of the good frame that data begins with, or None."""
    unit, function, third = data[:3]
    request, answer = 0, 0  # size as a request, as an answer; 0 = it cannot be one
    if function in (1, 2, 3, 4):
        request, answer = 8, 5 + third  # third: number of data bytes
    elif function in (5, 6):
        request, answer = 8, 8  # the very same bytes: taken as a request
    elif function == WRITE and len(data) >= 8:
        request, answer = 9 + data[6], 8  # data[6]: number of bytes to write
    elif function > 0x80 and third < 12:
        answer = 5  # an exception, third is its code, below 12
    # compute_CRC() is 0 over a frame with its CRC, and still 0 if zero bytes follow: a
    # short frame and zeros could pass as a long one. So the shorter size goes first.
    for size, is_answer in sorted([(request, False), (answer, True)]):  # tie: request
        if 0 < size <= len(data) and FramerRTU.compute_CRC(data[:size]) == 0:
            return data[:size], is_answer
    # No size fits. All of data may still be one request to us, to be refused: another
    # function, or a WRITE cut short (a READ always has 8 bytes). Not in noise, where
    # find_frames() tries every byte: of so many CRCs one may be good by chance.
    is_ours = unit == unit_id and 0 < function < 0x80 and function != READ
    if no_noise_before and is_ours and FramerRTU.compute_CRC(data) == 0:
        return data, False
    return None


def find_frames(data):
    """Return all good frames in data as (frame, is an answer), and the bytes left."""
    frames, start, end = [], 0, 0  # data[:end] is done; start > end: noise in between
    while start <= len(data) - 4:  # 4 bytes: the shortest frame
        found = first_frame(data[start:], no_noise_before=(start == end))
        if found:
            frames.append(found)
            end = start + len(found[0])
        start = end if found else start + 1  # noise may come before a frame
    return frames, data[end:][-MAX_FRAME:]


class Refusal(ExceptionResponse):
    async def datastore_update(self, _context, _unit_id):
        """Return itself as the answer: pymodbus calls this on each decoded request."""
        return self


class Line(FramerRTU):  # FramerRTU loses requests to us and answers those to others
    """The framer of all servers: finds the requests to us, and wrong serial settings.

    Pauses of a TICK part the bytes into pieces; a piece without a good frame is a
    misfit. Two good frames, or one request to us, prove that the settings are right.
    """

    def __init__(self, meter):
        super().__init__(DecodePDU(is_server=True))
        self.MAX_SIZE = 4096  # if more bytes wait, pymodbus drops all; its default: 264
        self.meter = meter
        self.own = SerialSettings(baudrate, parity, stopbits)  # of the settings block
        self.settings = self.own  # serve() tries others where they are wrong
        self.is_open, self.fault = False, ""  # of the adapter; fault "" = none
        self.proven, self.alive = False, False  # settings are right; any byte came
        self.last_read = -READ_TIMEOUT  # s; below 0 = never
        self.quiet_since = now()  # s; "has not read for 60 s" is counted from here
        self.refused = b""  # the first request to us that was refused
        self.asked, self.answering = set(), set()  # unit ids of others
        self.begin()

    def begin(self):
        """Begin to listen with the settings."""
        self.left = b""  # the bytes that belong to no frame yet
        # The first piece counts as fitting, as it may begin amid a frame.
        self.piece_fits = True  # whether the present piece has had a good frame
        self.byte_came = True  # since the last TICK; now True: the first TICK is no gap
        self.good_frames, self.misfits = 0, []  # misfits: times in s
        self.unanswered = None  # the open request, which buildFrame() has to answer

    def handleFrame(self, data, _unit_id, _transaction_id):
        """Take the bytes that came; return their number, and the open request or None.

        - pymodbus answers later, and only what the latest call returned. So each call
          returns the open request again: a None in between would lose its answer.
        - Yet it is answered once: buildFrame() closes it, as does any new frame.
        """
        self.byte_came, self.alive = True, True
        frames, self.left = find_frames(self.left + data)
        for frame, is_answer in frames:
            unit, function = frame[0], frame[1]
            self.unanswered = None  # a frame came after it: too late for an answer
            if is_answer:
                self.answering.add(unit)
            elif unit == unit_id:
                self.unanswered = self.take_request(frame[1:-2])
            elif function in (3, 4) and 0 < unit < 248:  # a read as for a meter
                self.asked.add(unit)
            if function < 0x80:  # exceptions prove nothing: 5 bytes may be chance
                self.piece_fits, self.misfits = True, []
                self.good_frames += 1
        self.proven = self.proven or self.good_frames > 1  # or by take_request()
        return len(data), self.unanswered

    def take_request(self, request):
        """Return the PDU of a request (from its function code on), or its Refusal."""
        self.proven = True
        self.meter.update()  # before each answer, so that no value too old goes out
        code = refusal(request)
        if code:
            self.refused = self.refused or request
        elif request[0] == READ:
            self.last_read = self.quiet_since = now()
        pdu = Refusal(request[0], code) if code else self.decoder.decode(request)
        pdu.dev_id = unit_id
        return pdu

    def buildFrame(self, answer):
        """Return an answer's bytes; b"" where its request is no longer open."""
        if not self.unanswered:
            return b""
        self.unanswered = None
        return super().buildFrame(answer)

    def end_piece(self):
        """Each TICK: end the piece if no byte came, or if noise leaves no gaps."""
        is_gap = not self.byte_came
        self.byte_came = False
        is_full = not self.proven and len(self.left) >= MAX_FRAME  # noise without gaps
        if is_gap or is_full:  # is_full may cut a frame in two, so only while unproven
            if self.left and not self.piece_fits:  # bytes came, no good frame: a misfit
                recent = [time for time in self.misfits if now() - time < 3 * PATIENCE]
                self.misfits = [*recent, now()]  # the older ones were rare noise
            self.left, self.piece_fits = b"", False  # the next piece has no frame yet

    def is_wrong(self):
        """Return whether misfits span PATIENCE; for other settings, one is enough."""
        if self.proven or not self.misfits:
            return False
        patience = PATIENCE if self.settings == self.own else 0  # s; 0: one is enough
        return self.misfits[-1] - self.misfits[0] >= patience

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
        return next(sentence for is_true, sentence in reasons if is_true)


def look_after(broker, line):
    """Do all that is due by time; the main thread calls it each TICK."""
    try:
        broker.loop_start()  # starts paho's thread, also where an error has ended it
        line.meter.update()
        line.end_piece()
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
            quiet = f"the heat pump has not read for {READ_TIMEOUT} s"
            say("heat pump", log.warning, f"{quiet}: {line.diagnosis()}")
    except Exception as error:  # noqa: BLE001, the line has to be answered all the same
        say("error", log.exception, f"going on after an error: {error!r}")


def run_server(broker, line):
    """Open the adapter; on_adapter() then starts attend(), which ends the server."""

    async def attend():  # the only caller of ServerAsyncStop(): a second would raise
        while line.is_open and not line.is_wrong() and not orders:
            look_after(broker, line)
            await asyncio.sleep(TICK)
        line.fault = "" if line.is_open else "is not there"  # not open: it got lost
        await ServerAsyncStop()

    def on_adapter(is_open):  # called when the server has opened or lost it
        line.is_open = is_open
        if is_open:
            line.begin()
            asyncio.create_task(attend())
            say("adapter", log.info, f"the meter is on the line: {serial_port}")
            # pyserial turns the check of parity off: bytes with a wrong one would pass
            run(["stty", "-F", serial_port, "inpck"], stderr=DEVNULL, check=False)

    line.meter.baudrate = line.settings.baudrate
    port = {"port": serial_port, **line.settings._asdict()}
    try:
        serial.Serial(exclusive=True, **port).close()  # raises what pymodbus hides
        StartSerialServer(line.meter, trace_connect=on_adapter, **port)  # blocks
    except (OSError, RuntimeError, termios.error) as error:  # args: [errno,] text
        line.fault = ADAPTER_FAULTS.get(error.args[0], f"fails: {error.args[-1]}")


def serve(broker, line):
    """Run server after server until the stop, with other settings after wrong ones."""
    FRAMER_NAME_TO_CLASS[FramerType.RTU] = lambda _decoder: line  # each server's framer
    every = [SerialSettings(rate, letter, 1) for rate in BAUDRATES for letter in "ENO"]
    to_try = cycle([*(other for other in every if other != line.own), line.own])
    while not orders:
        run_server(broker, line)
        if line.fault:  # maybe the adapter cannot do unproven settings: back to own
            line.settings = line.settings if line.proven else line.own
            what = f"the adapter {serial_port} {line.fault}: trying every second"
            say("adapter", log.warning, what)
            look_after(broker, line)
            sleep(1)
            line.quiet_since = now()  # the heat pump could not read: 60 s begin anew
        elif line.is_wrong():
            line.settings = next(to_try)
            if line.settings == line.own:  # all the others have been tried
                say("round", log.warning, "no serial settings fit: swap A and B")


def main():
    """Carry the value from the broker to the line, until Ctrl-C or SIGTERM."""
    check_settings()
    for number in (signal.SIGINT, signal.SIGTERM):  # KeyboardInterrupt could get lost
        signal.signal(number, lambda *_: orders.append("stop"))
    # Ctrl-S in the terminal stops only the listener's thread; a full queue drops lines.
    lines, layout = queue.Queue(1000), "%(asctime)s %(levelname)s %(message)s"
    QueueListener(lines, logging.StreamHandler(sys.stdout)).start()
    logging.basicConfig(level=log_level, handlers=[QueueHandler(lines)], format=layout)
    logging.raiseExceptions = False  # else each dropped line prints a traceback
    logging.getLogger("pymodbus.logging").disabled = log_level != "DEBUG"
    log.info("powermeter.py starts")
    broker = Broker(Meter())
    serve(broker, Line(broker.meter))
    if status_topic:
        broker.publish(status_topic, "offline", retain=True)
    broker.disconnect()
    sleep(0.5)  # for the threads to send and write what is left
    os._exit(0)  # a stopped terminal would hold up a normal end for ever


if __name__ == "__main__":
    main()
