"""Viessmann's energy meter, a rebranded Saia-Burgess ALE3, emulated on RS-485.

The home automation publishes the remaining power in Watt, the heat pump reads it:

    restPower = hpPower - gridPower      (gridPower < 0: power goes to the grid)
    MQTT broker -> on_message -> state.reading -> access -> RS-485 -> heat pump

Edit the settings, then start it: python3 powermeter.py
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
serial_port = "/dev/ttyUSB0"  # the adapter
baudrate = 19200  # bit/s: 1200, 2400, 4800, 9600, 19200, 38400, 57600 or 115200
parity = "E"  # "E" = even, "O" = odd, "N" = none
stopbits = 1  # 1 or 2
unit_id = 60  # the meter's Modbus address, 1 to 247
surplus_sign = 1  # 1 = the heat pump wants surplus positive, -1 = negative

log_level = "INFO"  # "DEBUG" = every frame too; "WARNING", "ERROR" = less
# ========================= End of the settings =========================

import asyncio
import errno
import logging
import os
import signal
import ssl
import struct
import sys
import termios
import threading
from contextlib import suppress
from time import monotonic, sleep
from types import SimpleNamespace

import paho.mqtt.client as mqtt
import serial
from pymodbus.constants import ExcCodes
from pymodbus.framer import FRAMER_NAME_TO_CLASS, FramerRTU, FramerType
from pymodbus.pdu import ExceptionResponse, ModbusPDU
from pymodbus.pdu import ReadHoldingRegistersRequest as Read
from pymodbus.server import ServerAsyncStop, ServerStop, StartSerialServer
from pymodbus.simulator import DataType, SimData, SimDevice

READ_TIMEOUT = 60  # s without a request after which the heat pump does not read
MAX_FRAME = 256  # bytes
MAX_GAP = 0.1  # s between two pieces of a frame; USB adapters make gaps of 0.02 s
BROKER = f"the MQTT broker {mqtt_server}:{mqtt_port}"

# What crosses between the threads. It needs no lock: each field is set by one thread,
# as a whole, to a new object, so that the others see either the old one or the new.
state = SimpleNamespace(
    reading=(0.0, monotonic()),  # rest power in W, and its arrival in s
    session=False,  # an object for each login at the broker; None: not yet answered
    asked=None,  # when the last request to our unit came, in s
    heard=False,  # whether anything else has come on the line since then
    units=frozenset(),  # the other units that were asked since then
    stopping=False,  # whether Ctrl-C or SIGTERM came
)
log = logging.getLogger("powermeter")
last_said = {}  # by subject


def say(subject, write, text):
    """Write a line to the log, unless it is the last that was said on its subject."""
    if last_said.get(subject) != text:
        last_said[subject] = text
        write(text)


def check_settings():
    """End the script with status 2 and one line where a setting cannot work."""
    is_topic = lambda v: v + "" and not {*"+#\0"} & {*v}  # what is no text raises
    load_ca = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT).load_verify_locations
    bauds = (1200, 2400, 4800, 9600, 19200, 38400, 57600, 115200)
    levels = ("DEBUG", "INFO", "WARNING", "ERROR")
    rules = {  # a value can work where this is true and raises no error
        "topic": (is_topic, "a topic without + and #"),
        "mqtt_server": (lambda v: v.encode("idna"), "a host name or an IP address"),
        "mqtt_port": (lambda v: v in range(1, 65536), "1 to 65535"),
        "mqtt_tls": (lambda v: v in (True, False), "True or False"),
        "mqtt_ca_file": (lambda v: v == "" or not load_ca(v), "'' or a CA file"),
        "max_age": (lambda v: v >= 0, "a number of seconds, or 0"),
        "status_topic": (lambda v: v == "" or v != topic and is_topic(v), "a topic"),
        "serial_port": (lambda v: v + "" and "\0" not in v, "the path of a device"),
        "baudrate": (lambda v: v in bauds, bauds),
        "parity": (lambda v: v in ("N", "E", "O"), "'N', 'E' or 'O'"),
        "stopbits": (lambda v: v in (1, 2), "1 or 2"),
        "unit_id": (lambda v: v in range(1, 248), "1 to 247"),
        "surplus_sign": (lambda v: v in (1, -1), "1 or -1"),
        "log_level": (lambda v: v in levels, levels),
    }
    for name, (can_work, allowed) in rules.items():
        value = globals()[name]
        with suppress(AttributeError, OSError, TypeError, ValueError):
            # 19200.0 equals 19200, but is no register
            if can_work(value) and (type(value) is not float or name == "max_age"):
                continue
        print(f"{name} = {value!r} cannot work, it may be: {allowed}", file=sys.stderr)
        sys.exit(2)


# ------------------- The meter: Saia-Burgess ALE3, datasheet 26-527 -------------------
VOLTAGE = 230  # V
MAX_WATTS = 327670  # W: the total is 16 bits of 10 W
MAX_COUNT = 20  # registers in one read
READ, WRITE = 3, 16  # its function codes: Read Holding and Write Multiple Registers
PARTIAL_COUNTERS = (30, 34)  # R of the high word; zeros to both words are taken


def meter_registers(watts):
    """Return the meter's registers R1 to R52 (16 bits each) for a rest power in W."""
    phase = (
        VOLTAGE,  # voltage, V
        round(abs(watts) / 3 / VOLTAGE * 10),  # current, 0.1 A
        surplus_sign * round(watts / 30) & 0xFFFF,  # active power, 10 W
        0,  # reactive power, 10 var
        100,  # cos phi, 0.01
    )
    return [
        *(11, 52, 0),  # R1-3 firmware version 1.1, number of registers, of flags
        *divmod(baudrate, 0x10000),  # R4-5 baudrate, bit/s
        0,  # R6 not used
        *struct.unpack(">8H", b"ALE3D5FD10C2A00\0"),  # R7-14 type
        11,  # R15 hardware version 1.1
        *(0, 0, 1),  # R16-18 serial number
        *(0, 0, 0),  # R19-21 not used
        0,  # R22 status, 0 = no problem
        60,  # R23 response timeout, ms
        unit_id,  # R24 Modbus address
        *(0, 0, 0),  # R25-27 error of the phases, not used, tariff
        *(0, 0, 0, 0),  # R28-31 energy total and partial, tariff 1, 0.01 kWh
        *(0, 0, 0, 0),  # R32-35 tariff 2; all 0, as counts would be lost at restarts
        *phase,  # R36-40 phase 1
        *phase,  # R41-45 phase 2
        *phase,  # R46-50 phase 3
        surplus_sign * round(watts / 10) & 0xFFFF,  # R51 active power, total, 10 W
        0,  # R52 reactive power, total, 10 var
    ]


async def access(_function, _start, address, count, registers, values):
    """Return the exception code that refuses an access, or None; refresh the registers.

    Takes the wire address (R - 1), the count, and a write's values, None for a read.
    All registers are set in one go, so that no read sees two rest powers.
    """
    watts, arrival = state.reading
    too_old = max_age and monotonic() - arrival > max_age
    registers[:-1] = meter_registers(0.0 if too_old else watts)  # pymodbus adds one
    if values is None:
        return None if 1 <= count <= MAX_COUNT else ExcCodes.ILLEGAL_ADDRESS
    if address + 1 not in PARTIAL_COUNTERS or count != 2:
        return ExcCodes.ILLEGAL_ADDRESS
    return ExcCodes.ILLEGAL_VALUE if any(values) else None


# -------------------------- MQTT: where the value comes from --------------------------
def on_message(_client, _userdata, message):
    """Take over the rest power; where there is none in it, surplus is unknown: 0 W."""
    try:
        # float() alone would take nan, 1_000 and other scripts' digits
        strange = message.payload.translate(None, b"0123456789+-.eE \t\r\n")
        watts = float(message.payload)
        if strange or abs(watts) > MAX_WATTS:
            raise ValueError("no plain number, or more than the registers can hold")
    except ValueError:
        state.reading = (0.0, monotonic())
        text = message.payload[:80].decode(errors="replace")
        log.error("%r is no rest power in W: serving 0 W until one comes", text)
    else:
        # at a reconnect the broker sends what it retains again, however old that is
        if not message.retain or watts != state.reading[0]:
            state.reading = (watts, monotonic())
        log.info("rest power %g W: %d W per phase", watts, round(watts / 3))


def on_connect(client, _userdata, _flags, reason, _properties):
    """Subscribe, at each login anew since the broker forgets; or say the refusal."""
    if reason.is_failure:
        state.session = False
        what = f"the login, check mqtt_username and mqtt_password: {reason}"
        say("broker", log.error, f"{BROKER} refuses {what}")
    else:
        state.session = object()
        client.subscribe(topic)


def on_subscribe(client, _userdata, _mid, reasons, _properties):
    """Say that all is well; where the topic is refused, ask again a second later."""
    if any(reason.is_failure for reason in reasons):
        say("broker", log.error, f"{BROKER} refuses topic {topic} to mqtt_username")
        sleep(1)  # holds up paho's thread, which has nothing to receive yet
        client.subscribe(topic)
    else:
        say("broker", log.info, f"connected to {BROKER}, waiting for {topic}")


def on_connect_fail(_client, _userdata):
    """Say why the broker is out of reach; paho calls this as it handles the error."""
    error, write, hint = sys.exc_info()[1], log.warning, "trying again"
    if isinstance(error, ssl.SSLError):
        write, hint = log.error, "check mqtt_ca_file, mqtt_server and mqtt_port"
    say("broker", write, f"cannot reach {BROKER} ({error}): {hint}")


def on_disconnect(_client, _userdata, _flags, reason, _properties):
    """Say that the broker hung up; not where we did, or where it refused the login."""
    if reason.is_failure and state.session is not False:
        hint = "connecting again" if state.session else "check mqtt_port and mqtt_tls"
        say("broker", log.warning, f"{BROKER} closed the connection: {hint}")
    state.session = False


# ------------------------- Modbus: the line to the heat pump -------------------------
def find_frame(data, first):
    """Return size and "is a request" of the good frame that data (bytes) begins with.

    The size is 0 for none; sizes: Modbus Application Protocol V1.1b3. A frame to us
    whose size only its CRC tells has to come first in what was heard, or right behind
    another: elsewhere chance would find it in others' data.
    """
    function, length, sizes = data[1], len(data), {}
    if function >= 0x80:
        sizes = {5: False}
    elif 0 < function < 7:  # an answer to a read has at least one byte of data
        sizes = {5 + data[2] if function < 5 and data[2] else 8: False, 8: True}
    elif function == WRITE:
        sizes = {9 + data[min(6, length - 1)]: True, 8: False}
        first = first and length > 8  # pymodbus cannot decode less
    if first and data[0] == unit_id and 0 < function < 0x80 and function != READ:
        sizes.setdefault(length, True)  # of any size, to be refused
    for size, is_request in sizes.items():
        if size <= length and FramerRTU.compute_CRC(data[:size]) == 0:
            return size, is_request
    return 0, False


class LineFramer(FramerRTU):
    """Finds the newest request to our unit in all that comes on a shared line.

    pymodbus's own takes all for requests to itself: it loses ours and answers others'.
    """

    MAX_SIZE = 4096  # pymodbus drops more than 264 bytes, a request at their end too
    request = None  # the one still to be answered
    rest, arrival = b"", 0.0  # what may begin a frame, and when it came, in s

    def decode(self, new):
        """Return the number of new bytes, the unit id, 0 and our request, if any."""
        now, state.heard = monotonic(), True
        data = new if now - self.arrival > MAX_GAP else self.rest + new
        start = used = 0
        while start < len(data) - 3:  # the smallest frame has 4 bytes
            part = data[start : start + MAX_FRAME]
            size, is_request = find_frame(part, start == used)
            if size:
                used, unit, self.request = start + size, data[start], None
                if is_request and unit == unit_id:
                    self.request = data[start + 1 : used - 2]
                    state.asked, state.heard, state.units = now, False, frozenset()
                elif is_request and unit:  # 0 is a broadcast, no unit
                    state.units |= {unit}
            start += size or 1
        # kept here: pymodbus drops its rest when it answers, a request at the next byte
        self.rest, self.arrival = data[max(used, len(data) - MAX_FRAME) :], now
        return len(new), unit_id, 0, self.request or b""

    def encode(self, payload, device_id, tid):
        """Return the frame of an answer, or nothing where it was already given."""
        if not self.request:
            return b""
        self.request = None
        return super().encode(payload, device_id, tid)


async def refuse(request, _context, _unit):
    """Return exception 1, for a function that the ALE3 does not have."""
    return ExceptionResponse(request.function_code, ExcCodes.ILLEGAL_FUNCTION)


def on_adapter(connected):
    """Say that the meter is on the line, or end the server, which would wait on."""
    if connected:
        line = f"{serial_port}, {baudrate} bit/s 8{parity}{stopbits}, unit {unit_id}"
        say("line", log.info, f"the meter is on the line: {line}")
    elif not state.stopping:
        asyncio.create_task(ServerAsyncStop())


def serve():
    """Answer on the line, and wait for the adapter where it is missing, until stop."""
    FRAMER_NAME_TO_CLASS[FramerType.RTU] = LineFramer
    # access() judges the count of a read: pymodbus would answer a bad one with 0x80
    pdus = [type("AnyRead", (Read,), {"verifyCount": lambda *_: None})]
    for code in set(range(1, 0x80)) - {READ, WRITE}:
        refused = {"function_code": code, "datastore_update": refuse}
        pdus.append(type("Refused", (ModbusPDU,), refused))
    registers = SimData(0, values=meter_registers(0), datatype=DataType.REGISTERS)
    meter = SimDevice(unit_id, registers, action=access)
    port = {"port": serial_port, "baudrate": baudrate, "parity": parity}
    port["stopbits"] = stopbits
    reasons = {
        errno.ENOENT: "is not there",
        errno.EACCES: "may not be opened, add your user to the group dialout",
        errno.EAGAIN: "is in use by another program",
        errno.EBUSY: "is in use by another program",
    }
    while not state.stopping:
        try:
            serial.Serial(**port, exclusive=True).close()  # pymodbus hides the reason
            StartSerialServer(meter, **port, trace_connect=on_adapter, custom_pdu=pdus)
            reason = reasons[errno.ENOENT]  # the server ended as it was pulled
        except (OSError, RuntimeError, termios.error) as error:
            reason = reasons.get(error.args[0], f"does not work ({error})")
        if not state.stopping:
            what = f"the adapter {serial_port} {reason}"
            say("line", log.warning, f"{what}: trying every second")
            sleep(1)


# ------------------------------------ The whole ------------------------------------
def watch(client):
    """Say and publish what only time brings about, twice a second, for ever."""
    started, status, warned = monotonic(), "no heat pump", False
    told_old = published = None
    while True:
        sleep(0.5)
        client.loop_start()  # does nothing, unless an error has ended paho's thread
        if state.stopping:
            with suppress(RuntimeError):  # where no server runs
                ServerStop()
        reading, quiet = state.reading, monotonic() - (state.asked or started)
        if max_age and monotonic() - reading[1] > max_age and reading is not told_old:
            told_old = reading
            log.warning("no rest power for %g s: serving 0 W until one comes", max_age)
        if state.asked and quiet < READ_TIMEOUT and status != "online":
            status, warned = "online", False
            log.info("the heat pump reads the meter, unit %d", unit_id)
        elif quiet >= READ_TIMEOUT and not warned:
            status, warned = "no heat pump", True
            why = "nothing came: check wires A and B, adapter, the heat pump's settings"
            if state.heard:
                why = "no frame fits: check baudrate, parity, stopbits, or swap A and B"
            if state.units:
                units = ", ".join(map(str, sorted(state.units)))
                why = f"other units were asked: set unit_id to the right one of {units}"
            log.warning("the heat pump has not read for %g s: %s", READ_TIMEOUT, why)
        if status_topic and state.session and (status, state.session) != published:
            published = status, state.session
            client.publish(status_topic, status, retain=True)


def main():
    """Carry the value from the broker to the line, until Ctrl-C or SIGTERM."""
    check_settings()
    sys.stdout.reconfigure(errors="backslashreplace")
    line = "%(asctime)s %(levelname)s %(message)s"
    logging.basicConfig(stream=sys.stdout, level=log_level, format=line)
    if log_level == "INFO":
        logging.getLogger("pymodbus").setLevel("WARNING")
    for number in (signal.SIGINT, signal.SIGTERM):  # pymodbus would swallow Ctrl-C
        signal.signal(number, lambda *_: setattr(state, "stopping", True))
    log.info("powermeter.py starts")

    # One name for all its sessions: a dead one ends, with its will, before the next.
    name = f"powermeter-{os.urandom(4).hex()}"
    client = mqtt.Client(mqtt.CallbackAPIVersion.VERSION2, name)
    client.on_pre_connect = lambda *_: setattr(state, "session", None)
    for hook in (on_connect, on_connect_fail, on_subscribe, on_message, on_disconnect):
        setattr(client, hook.__name__, hook)  # each is named as what it is for paho
    client.reconnect_delay_set(1, 10)  # s between two tries
    client.username_pw_set(str(mqtt_username) or None, str(mqtt_password) or None)
    if mqtt_tls:
        client.tls_set(mqtt_ca_file or None)
    if status_topic:
        client.will_set(status_topic, "offline", retain=True)
    client.connect_async(mqtt_server, mqtt_port, keepalive=10)  # s, to notice its death
    client.loop_start()
    threading.Thread(target=watch, args=(client,), daemon=True).start()
    serve()
    log.info("powermeter.py ends")
    if state.session:
        if status_topic:
            client.publish(status_topic, "offline", retain=True)
        client.disconnect()
        client.loop_stop()


if __name__ == "__main__":
    main()
