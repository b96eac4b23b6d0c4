"""Viessmann's energy meter, a rebranded Saia-Burgess ALE3, emulated on RS-485.

    restPower = hpPower - gridPower      in W; gridPower < 0: power goes to the grid
    MQTT broker -> Broker.on_message -> Meter.registers -> pymodbus -> heat pump

Edit the settings, then start it in the README's environment: python3 powermeter.py
"""

# ============================== Settings ==============================
# The value, and the MQTT broker that it comes from
topic = "electricity/hp/restpower"  # topic of the rest power, in Watt
mqtt_server = "localhost"  # the broker's name or IP address
mqtt_port = 1883  # the broker's port: 1883, with TLS mostly 8883
mqtt_username = ""  # login at the broker; "" = without
mqtt_password = ""  # its password; "" = without
mqtt_tls = False  # True = encrypted, and the broker's certificate is verified
mqtt_ca_file = ""  # CA file for a broker's own certificate; "" = the system's CAs
max_age = 300  # s, a value older than that is served as 0 W; 0 = no limit
status_topic = ""  # topic to publish on whether the heat pump reads; "" = none

# The RS-485 line to the heat pump, and what it wants to read
serial_port = "/dev/ttyUSB0"  # the adapter; better its name in /dev/serial/by-id/
baudrate = 19200  # bit/s; the heat pump's own is found, this is only tried first
parity = "E"  # "E" = even, "O" = odd, "N" = none; found as well
stopbits = 1  # 1 or 2; 1 hears 2 as well, so only 1 is tried later
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
from functools import partial
from logging.handlers import QueueHandler, QueueListener
from subprocess import DEVNULL, run
from time import CLOCK_BOOTTIME, clock_gettime, sleep

import paho.mqtt.client as mqtt
import serial
from pymodbus.constants import ExcCodes
from pymodbus.framer import FRAMER_NAME_TO_CLASS, FramerRTU, FramerType
from pymodbus.pdu import DecodePDU, ExceptionResponse
from pymodbus.server import ServerAsyncStop, StartSerialServer
from pymodbus.simulator import DataType, SimData, SimDevice

READ_TIMEOUT = 60  # s without a read after which the heat pump counts as not reading
PATIENCE = 20  # s in which bytes came but no frame, then other settings are tried
MAX_GAP = 0.1  # s between two pieces of a frame; USB adapters make gaps of 0.02 s
MAX_FRAME = 256  # bytes
BAUDRATES = (19200, 9600, 38400, 115200, 57600, 4800, 2400, 1200)  # likely ones first
LOG_LEVELS = ("DEBUG", "INFO", "WARNING", "ERROR")
# A plain number; float() alone would take nan, 1_000 and other alphabets' digits too.
NUMBER = re.compile(rb"\s*[+-]?(\d+(\.\d*)?|\.\d+)([eE][+-]?\d+)?\s*")
ADAPTER_FAULTS = {
    errno.ENOENT: "is not there",
    errno.ENODEV: "is not there",
    errno.EACCES: "may not be opened, add your user to the group dialout",
    errno.EAGAIN: "is in use by another program",
    errno.EBUSY: "is in use by another program",
}
# paho's thread runs Broker's methods on_..., the main thread all the rest, in the event
# loop of pymodbus's server while that runs. Both use Meter and Broker.
now = partial(clock_gettime, CLOCK_BOOTTIME)  # s, goes on while a computer sleeps
NEVER = float("-inf")  # as a time
log = logging.getLogger("powermeter")
last_said = {}  # subject: the last text that say() wrote on it
orders = []  # Ctrl-C and SIGTERM add "stop", on which the main thread ends the script


def say(subject, write, text):
    """Write a line by a method of log, unless it was the last on its subject."""
    if last_said.get(subject) != text:
        last_said[subject] = text
        write(text)


def is_host(text):
    """Return whether text can be a host or an IP address; one ":" would be a port's."""
    return text.encode("idna") and text.count(":") != 1 and not set(text) & set("/[ \0")


def check_settings():
    """End the script with status 2 and one line where a setting cannot work."""
    text, whole, number, login = (str,), (int,), (int, float), (str, int)
    wild = set("+#\0")  # these are not allowed in a topic
    load_ca = ssl.create_default_context  # raises OSError for a file without a CA
    rows = (  # name, types, whether a value of these types can work, what it may be
        ("topic", text, lambda v: v and wild.isdisjoint(v), "a topic without + and #"),
        ("mqtt_server", text, is_host, "a host name or an IP address, without a port"),
        ("mqtt_port", whole, lambda v: 1 <= v <= 65535, "1 to 65535"),
        ("mqtt_username", login, lambda v: True, "a text, or '' for none"),
        ("mqtt_password", login, lambda v: True, "a text, or '' for none"),
        ("mqtt_tls", (bool,), lambda v: True, "True or False"),
        ("mqtt_ca_file", text, lambda v: not v or load_ca(cafile=v), "'' or a CA file"),
        ("max_age", number, lambda v: v >= 0, "a number of seconds, or 0"),
        ("status_topic", text, lambda v: v != topic and wild.isdisjoint(v), "a topic"),
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
        except (OSError, ValueError):  # of a file or host name
            is_fine = False
        if not is_fine:
            fault = f"= {value!r} cannot work" if name in globals() else "is missing"
            quotes = " in quotes" if type(value) is str and str not in types else ""
            print(f"{name} {fault}{quotes}, it may be: {allowed}", file=sys.stderr)
            sys.exit(2)


# ------------------- The meter: Saia-Burgess ALE3, datasheet 26-527 -------------------
VOLTAGE = 230  # V
MAX_WATTS = 327670  # W: the total is 16 bits of 10 W
REGISTERS = 52
MAX_COUNT = 20  # registers in one read
READ, WRITE = 3, 16  # its function codes: Read Holding and Write Multiple Registers
RESETTABLE = (30, 34)  # R of counters of two words that may be set to 0; R1 is wire 0


def meter_registers(watts, rate):
    """Return R1 to R52 (16 bits each) for a rest power in W and a baudrate in bit/s."""
    current = round(abs(watts) / 3 / VOLTAGE * 10)  # 0.1 A
    power = (surplus_sign * round(watts / 30)) & 0xFFFF  # 10 W, in two's complement
    phase = (VOLTAGE, current, power, 0, 100)  # 0 var, cos phi 1.00 in steps of 0.01
    return [
        *(11, REGISTERS, 0),  # R1-3 firmware version 1.1, number of registers, of flags
        *(*divmod(rate, 0x10000), 0),  # R4-5 baudrate, bit/s, R6 not used
        *struct.unpack(">8H", b"ALE3D5FD10C2A00\0"),  # R7-14 type
        *(11, 0, 0, 1),  # R15 hardware version 1.1, R16-18 serial number
        *(0, 0, 0),  # R19-21 not used
        *(0, 60),  # R22 status, 0 = no problem, R23 response timeout, ms
        *(unit_id, 0, 0, 0),  # R24 Modbus address, R25-27 errors, not used, tariff
        *[0] * 8,  # R28-35 energy, 0.01 kWh; 0, as counts would be lost at restarts
        *(phase * 3),  # R36-50 phases 1 to 3
        (surplus_sign * round(watts / 10)) & 0xFFFF,  # R51 active power, total, 10 W
        0,  # R52 reactive power, total, 10 var
    ]


def refusal(request):
    """Return the exception code for a request (bytes, function code first), or None."""
    function = request[0]
    if function not in (READ, WRITE):
        return ExcCodes.ILLEGAL_FUNCTION
    if function == READ:
        wire_address, count = struct.unpack(">HH", request[1:])  # always 4 bytes
        fits = 1 <= count <= MAX_COUNT and wire_address + count <= REGISTERS
        return None if fits else ExcCodes.ILLEGAL_ADDRESS
    if len(request) < 6:  # a write cut short, which find_frames() lets through
        return ExcCodes.ILLEGAL_VALUE
    wire_address, count, byte_count = struct.unpack(">HHB", request[1:6])
    if count == 0 or not byte_count == len(request) - 6 == 2 * count:
        return ExcCodes.ILLEGAL_VALUE
    if count != 2 or wire_address + 1 not in RESETTABLE:
        return ExcCodes.ILLEGAL_ADDRESS
    return ExcCodes.ILLEGAL_VALUE if any(request[6:]) else None  # zeros may pass


class Meter(SimDevice):
    """pymodbus's datastore: paho's thread writes the registers, the server reads them.

    The main thread writes too, 0 W for a value that is too old. They take turns by the
    lock, and write all registers in one assignment, which no read can see half done.
    """

    def __init__(self):
        zeros = SimData(0, values=[0] * REGISTERS, datatype=DataType.REGISTERS)
        super().__init__(unit_id, zeros)
        built = super().build_device()
        self.build_device = lambda: built  # each server calls it, all share .registers
        _first_address, self.registers, _types = built
        self.lock = threading.Lock()
        self.baudrate = baudrate  # in use, bit/s; serve() sets it
        self.too_old = False  # whether 0 W are served, as the rest power is too old
        self.update(0.0)

    def update(self, watts=None):
        """Write the registers for a new rest power in W; without one, check its age."""
        with self.lock:
            if watts is not None:
                self.watts, self.arrival = watts, now()
            was_too_old = self.too_old
            self.too_old = max_age > 0 and now() - self.arrival > max_age
            self.served = 0.0 if self.too_old else self.watts
            self.registers[:REGISTERS] = meter_registers(self.served, self.baudrate)
        if self.too_old and not was_too_old:
            log.warning("no rest power for %g s: serving 0 W until one comes", max_age)


# -------------------------- MQTT: where the value comes from --------------------------
class Broker(mqtt.Client):
    """The connection to the MQTT broker; paho's thread calls the methods on_..."""

    def __init__(self, meter):
        # One client id for all sessions: the broker ends a dead one before the next.
        client_id = f"powermeter-{os.urandom(4).hex()}"
        super().__init__(mqtt.CallbackAPIVersion.VERSION2, client_id)
        self.meter = meter
        self.name = f"the MQTT broker {mqtt_server}:{mqtt_port}"
        self.login = "asked"  # by each try; then "let in", "refused" or "closed"
        self.numbers = []  # the last 1000 rest powers in W, see on_message()
        self.last_status = ""  # the last that was published in this session
        self.reconnect_delay_set(1, 10)  # s between two tries
        self.username_pw_set(str(mqtt_username) or None, str(mqtt_password) or None)
        if mqtt_tls:
            self.tls_set(mqtt_ca_file or None)
        if status_topic:
            self.will_set(status_topic, "offline", retain=True)
        self.connect_async(mqtt_server, mqtt_port, keepalive=10)  # s; at loop_start()

    def on_message(self, _client, _userdata, message):
        """Write the rest power into the datastore; 0 W where it is no plain number."""
        payload = message.payload
        if not NUMBER.fullmatch(payload) or abs(float(payload)) > MAX_WATTS:
            self.meter.update(0.0)
            text = payload[:80].decode(errors="replace")
            log.error("%r is no rest power in W: serving 0 W until one comes", text)
            return
        watts = float(payload)
        # A retained value comes again at each login: one seen before keeps its old age.
        if message.retain and watts in self.numbers:
            if watts != self.numbers[-1]:  # maybe older than the last: trust neither
                self.meter.update(0.0)
            log.info("rest power %g W again: serving %g W", watts, self.meter.served)
            return
        self.numbers = [*self.numbers[-999:], watts]
        self.meter.update(watts)
        log.info("rest power %g W: %d W per phase", watts, round(watts / 3))

    def on_pre_connect(self, _client, _userdata):
        """Note that a login begins."""
        self.login = "asked"

    def on_connect(self, _client, _userdata, _flags, reason, _properties):
        """Subscribe, at each login as the broker forgets; or say that it refuses."""
        if reason.is_failure:
            self.login = "refused"
            what = f"the login, check mqtt_username and mqtt_password: {reason}"
            say("broker", log.error, f"{self.name} refuses {what}")
        else:
            self.login = "let in"
            self.subscribe(topic)
            self.last_status = ""  # so that look_after() publishes it

    def on_subscribe(self, _client, _userdata, _mid, reasons, _properties):
        """Say that all is well; where the topic is refused, ask a second later."""
        if any(reason.is_failure for reason in reasons):
            refused = f"topic {topic} to mqtt_username"
            say("broker", log.error, f"{self.name} refuses {refused}")
            sleep(1)  # holds up paho's thread, which has nothing to receive yet
            self.subscribe(topic)
        else:
            say("broker", log.info, f"connected to {self.name}, waiting for {topic}")

    def on_connect_fail(self, _client, _userdata):
        """Say why the broker cannot be reached."""
        error = sys.exc_info()[1]  # paho calls this while it handles the error
        write, hint = log.warning, "trying again"
        if mqtt_tls and isinstance(error, (ssl.SSLError, ConnectionResetError)):
            write = log.error
            hint = "check mqtt_tls, mqtt_port, mqtt_ca_file and mqtt_server"
        say("broker", write, f"cannot reach {self.name} ({error}): {hint}")

    def on_disconnect(self, _client, _userdata, _flags, reason, _properties):
        """Say that the broker hung up; nothing if it refused or this script hung up."""
        closed = f"{self.name} closed the connection"
        if reason.is_failure and self.login == "let in":
            say("broker", log.warning, f"{closed}: connecting again")
        elif reason.is_failure and self.login == "asked":
            say("broker", log.warning, f"{closed}: check mqtt_port and mqtt_tls")
        self.login = "closed"  # paho may call this twice for one end: the 2nd is silent


# -------- Modbus: frames, by the Modbus Application Protocol V1.1b3, chapter 6 --------
def frame_sizes(data):
    """Return (size in bytes, is a request) of the frames that data may begin with."""
    function, byte_count = data[1], data[2]  # a request has its address there
    if function in (1, 2, 3, 4) and byte_count not in (0, 3):  # 5 + 3 = a request's 8
        return [(8, True), (5 + byte_count, False)]
    if function in (1, 2, 3, 4, 5, 6):  # 5 and 6 are answered by the very same bytes
        return [(8, True)]
    if function == WRITE and len(data) >= 8:
        return [(9 + data[6], True), (8, False)]
    is_exception = function > 0x80 and byte_count < 12  # then that byte is its code
    return [(5, False)] if is_exception else []


def find_frames(data):
    """Return the frames in data (bytes), as (frame, is a request), and what is left."""
    frames, start = [], 0
    while start < len(data) - 3:  # at every offset: a frame may follow anything
        for size, is_request in sorted(frame_sizes(data[start:])):  # shortest first
            frame = data[start : start + size]
            if len(frame) == size and FramerRTU.compute_CRC(frame) == 0:
                frames.append((frame, is_request))
                data, start = data[start + size :], 0  # on behind it
                break  # try none longer: zeros behind a frame leave its CRC good
        else:
            start += 1
    # Is the whole rest a request to us, with an unknown function or a write cut short?
    # It gets refused. A part is not tried: some part has a good CRC by chance.
    is_ours = len(data) >= 4 and data[0] == unit_id and 0 < data[1] < 128
    if is_ours and data[1] != READ and FramerRTU.compute_CRC(data) == 0:
        return [*frames, (data, True)], b""
    return frames, data[-MAX_FRAME:]


class Refusal(ExceptionResponse):
    async def datastore_update(self, _context, _unit_id):
        """Return itself: a refused request is to pymodbus its own answer."""
        return self


class Line(FramerRTU):  # pymodbus's own loses requests to us, and answers others'
    """The framer of all servers: finds our requests, and the right serial settings."""

    def __init__(self, meter):
        super().__init__(DecodePDU(is_server=True))
        self.MAX_SIZE = 4096  # pymodbus drops more than 264 bytes, the newest too
        self.meter = meter
        self.settings = (baudrate, parity, stopbits)  # that serve() has to use
        every = [(rate, letter, 1) for rate in BAUDRATES for letter in "ENO"]
        self.candidates = list(dict.fromkeys([self.settings, *every]))
        self.proven = False  # whether the settings are right, which stays so
        self.heard = False  # whether anything ever came
        self.last_read = NEVER  # s
        self.quiet_since = now()  # s; start, last read or last second without adapter
        self.refused = b""  # the first request to us that was refused
        self.asked, self.answering = set(), set()  # unit ids of others
        self.begin()

    def begin(self):
        """Begin to listen with the settings."""
        self.left, self.last_byte = b"", now()  # bytes that are no frame yet, and s
        # A piece is what comes between two gaps; the first may be cut off, no misfit.
        self.has_frame = True  # in this piece; True here lets the first one pass
        self.good_frames, self.misfits = 0, []  # misfits: times in s, see end_piece()
        self.unanswered = None  # the request that buildFrame() has to answer

    def handleFrame(self, data, _unit_id, _transaction_id):
        """Return the bytes used, all of them, and the request to us that waits."""
        if now() - self.last_byte > MAX_GAP:
            self.end_piece()
        self.last_byte, self.heard = now(), True
        frames, self.left = find_frames(self.left + data)
        for frame, is_request in frames:
            unit, function = frame[0], frame[1]
            self.unanswered = None  # whoever spoke next, it is too late for an answer
            if is_request and unit == unit_id:
                self.unanswered = self.take_request(frame[1:-2])
            elif not is_request:
                self.answering.add(unit)
            elif function in (3, 4):  # 5 and 6 look alike as request and answer
                self.asked.add(unit)
            if function < 0x80:  # exceptions are so short that chance makes them
                self.has_frame, self.misfits = True, []
                self.good_frames += 1
        self.proven = self.proven or self.good_frames > 1
        # New bytes make pymodbus drop an unanswered request: return it each time.
        return len(data), self.unanswered

    def take_request(self, request):
        """Return a request to us (bytes from the function code on) for pymodbus."""
        self.proven = True
        self.meter.update()  # no old value is answered, even if nothing else runs
        code = refusal(request)
        if code:
            self.refused = self.refused or request
        elif request[0] == READ:
            self.last_read = self.quiet_since = now()
        pdu = Refusal(request[0], code) if code else self.decoder.decode(request)
        pdu.dev_id = unit_id
        return pdu

    def buildFrame(self, answer):
        """Return an answer's bytes, but b"" where the request is answered already."""
        if not self.unanswered:
            return b""
        self.unanswered = None
        return super().buildFrame(answer)

    def end_piece(self):
        """End a piece, at a gap: without a frame in it, it is a misfit."""
        if self.left and not self.has_frame and not self.proven:
            self.misfits.append(now())
        self.left, self.has_frame = b"", False

    def judge(self):
        """At a misfit take the next settings; the user's own get PATIENCE first."""
        if self.proven:
            return
        if now() - self.last_byte > MAX_GAP or len(self.left) == MAX_FRAME:  # endless
            self.end_piece()
        self.misfits = [time for time in self.misfits if now() - time < READ_TIMEOUT]
        tried = self.candidates.index(self.settings)  # 0 = those of the settings block
        lasting = self.misfits[-1] - self.misfits[0] if self.misfits else 0  # s
        if lasting > PATIENCE or (self.misfits and tried > 0):
            self.settings = self.candidates[(tried + 1) % len(self.candidates)]
            if self.settings == self.candidates[0]:
                say("round", log.warning, "no serial settings fit: swap A and B")

    def diagnosis(self):
        """Return a sentence on why the heat pump does not read."""
        units = " or ".join(map(str, sorted(self.asked - self.answering - {0})))
        reasons = (  # the first that is true
            (self.last_read > NEVER, "it stopped asking: is it on, are all wires in?"),
            (self.refused, f"the meter refuses what it asks: {self.refused.hex(' ')}"),
            (units, f"other units are asked in vain: set unit_id = {units}"),
            (self.proven, "it does not ask for a meter: switch it on in its settings"),
            (self.heard, "no frame fits: trying other serial settings; swap A and B?"),
            (True, "nothing came: check wires A and B, adapter, the pump's settings"),
        )
        return next(sentence for is_true, sentence in reasons if is_true)


def look_after(broker, line):
    """Do what only time brings about; the main thread calls this all the time."""
    try:
        broker.loop_start()  # starts paho's thread, also where an error has ended it
        line.meter.update()
        line.judge()
        if line.proven and line.settings != line.candidates[0]:
            rate, letter, bits = line.settings
            advice = f'set baudrate = {rate}, parity = "{letter}", stopbits = {bits}'
            found = f"the heat pump speaks {rate} bit/s 8{letter}{bits}: {advice}"
            say("found", log.info, found)
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


def serve(broker, line):
    """Run server after server, for each new settings and adapter, until the stop."""

    def on_adapter(connected):
        line.is_open = connected
        line.begin()
        if connected:
            asyncio.create_task(attend())
            say("adapter", log.info, f"the meter is on the line: {serial_port}")
            # pyserial turns the check of parity off: odd would be taken for even
            run(["stty", "-F", serial_port, "inpck"], stderr=DEVNULL, check=False)

    async def attend():  # the only one to end a server: a second end raises
        while line.is_open and line.settings == settings and not orders:  # of serve()
            look_after(broker, line)
            await asyncio.sleep(0.2)
        await ServerAsyncStop()

    FRAMER_NAME_TO_CLASS[FramerType.RTU] = lambda _decoder: line  # for every server
    while not orders:
        settings = rate, par, bits = line.settings  # attend() ends at any others
        port = {"port": serial_port, "baudrate": rate, "parity": par, "stopbits": bits}
        line.meter.baudrate = rate
        fault = "is not there"  # if the server just returns: the adapter went away
        try:
            serial.Serial(exclusive=True, **port).close()  # pymodbus hides the error
            StartSerialServer(line.meter, trace_connect=on_adapter, **port)
        except (OSError, RuntimeError, termios.error) as error:
            fault = ADAPTER_FAULTS.get(error.args[0], f"fails: {error.args[-1]}")
        if line.settings == settings and not orders:  # so the adapter is the cause
            what = f"the adapter {serial_port} {fault}: trying every second"
            say("adapter", log.warning, what)
            look_after(broker, line)
            sleep(1)
            line.quiet_since = now()  # the heat pump could not read


def main():
    """Carry the value from the broker to the line, until Ctrl-C or SIGTERM."""
    check_settings()
    for number in (signal.SIGINT, signal.SIGTERM):  # an exception could get lost
        signal.signal(number, lambda *_: orders.append("stop"))
    sys.stdout.reconfigure(errors="backslashreplace")
    # A terminal stopped by Ctrl-S stops the listener's thread alone; lines are lost.
    lines, layout = queue.Queue(1000), "%(asctime)s %(levelname)s %(message)s"
    QueueListener(lines, logging.StreamHandler(sys.stdout)).start()
    logging.basicConfig(level=log_level, handlers=[QueueHandler(lines)], format=layout)
    logging.raiseExceptions = False
    logging.getLogger("pymodbus.logging").disabled = log_level != "DEBUG"
    log.info("powermeter.py starts")
    broker = Broker(Meter())
    serve(broker, Line(broker.meter))
    log.info("powermeter.py ends")
    if status_topic:
        broker.publish(status_topic, "offline", retain=True)
    broker.disconnect()
    sleep(0.5)  # for the threads to send and write what is left
    os._exit(0)  # a stopped terminal would hold up a normal end for ever


if __name__ == "__main__":
    main()
