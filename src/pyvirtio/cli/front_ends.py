"""What to tell the front-end of a served device: QEMU's options, libvirt's XML, and what QEMU calls the program."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple
from xml.sax.saxutils import escape, quoteattr

from pyvirtio.device import Device
from pyvirtio.errors import ConfigError
from pyvirtio.serve.vhost_user import Rings
from pyvirtio.spec import DeviceId

TYPES = {DeviceId.NET: "net", DeviceId.BLOCK: "block", DeviceId.CONSOLE: "console", DeviceId.ENTROPY: "rng"}
"""What QEMU's vhost-user.json calls the device types."""
FRONT_ENDS = {
    DeviceId.BLOCK: "vhost-user-blk-pci",
    DeviceId.ENTROPY: "vhost-user-rng-pci",
}
MEMORY = "-object memory-backend-memfd,id=mem,size=512M,share=on -machine q35,memory-backend=mem -m 512M"
QEMU_NAMESPACE = "http://libvirt.org/schemas/domain/qemu/1.0"


class Served(NamedTuple):
    """A device under its name, its socket, and what it offers besides split rings."""

    name: str
    path: Path
    device: Device
    rings: Rings


def capabilities(cls: type[Device]) -> dict[str, object]:
    """What `--print-capabilities` says, by QEMU's conventions for such programs."""
    if cls.id not in TYPES:
        raise ConfigError(f"{cls.__name__}: QEMU has no name for a vhost-user program of device type {cls.id}")
    features = ["read-only", "blk-file"] if cls.id == DeviceId.BLOCK else []
    return {"type": TYPES[DeviceId(cls.id)], "features": features}


def qemu_args(devices: Sequence[Served]) -> str:
    """The front-end's side. The guest's memory has to be shared with us."""
    return " \\\n    ".join(
        [MEMORY, *(f"{option} {value}" for served in devices for option, value in _options(served))]
    )


def _options(served: Served) -> Iterator[tuple[str, str]]:
    path = str(served.path).replace(",", ",,")
    packed = ",packed=on" if served.rings.packed else ""
    yield "-chardev", f"socket,id={served.name},path={path},reconnect=1"
    if served.device.id == DeviceId.NET:
        pairs = len(served.device.queues) // 2
        several = f",mq=on,vectors={2 * pairs + 2}" if pairs > 1 else ""
        yield "-netdev", f"vhost-user,id={served.name}-net,chardev={served.name},queues={pairs}"
        yield "-device", f"virtio-net-pci,netdev={served.name}-net{several}{packed}"
    else:
        yield "-device", f"{_front_end(served.device)}{packed},chardev={served.name}"


def _front_end(device: Device) -> str:
    known = FRONT_ENDS.get(DeviceId(device.id)) if device.id in set(DeviceId) else None
    queues = len(device.queues)
    if known is None:
        size = len(device.config_bytes())
        return f"vhost-user-device-pci,virtio-id={device.id},num_vqs={queues},config_size={size}"
    return f"{known},num-queues={queues}" if device.id == DeviceId.BLOCK else known


def libvirt_xml(devices: Sequence[Served]) -> str:
    """The parts of a domain; what libvirt has no element for goes to QEMU as it is."""
    disks = [served for served in devices if served.device.id == DeviceId.BLOCK]
    networks = [served for served in devices if served.device.id == DeviceId.NET]
    others = [served for served in devices if served not in (*disks, *networks)]
    elements = [line for index, served in enumerate(disks) for line in _disk(served, index)]
    elements += [line for served in networks for line in _interface(served)]
    lines = ["<memoryBacking>", "  <source type='memfd'/>", "  <access mode='shared'/>", "</memoryBacking>"]
    if elements:
        lines += ["<devices>", *(f"  {line}" for line in elements), "</devices>"]
    if others:
        pairs = [text for served in others for pair in _options(served) for text in pair]
        arguments = [f"  <qemu:arg value={quoteattr(text)}/>" for text in pairs]
        lines += [f"<qemu:commandline xmlns:qemu='{QEMU_NAMESPACE}'>", *arguments, "</qemu:commandline>"]
    return "\n".join(lines)


def _disk(served: Served, index: int) -> list[str]:
    name, path, device, rings = served
    packed = " packed='on'" if rings.packed else ""
    return [
        "<disk type='vhostuser' device='disk'>",
        f"  <driver name='qemu' type='raw' queues='{len(device.queues)}'{packed}/>",
        f"  <source type='unix' path={quoteattr(str(path))}><reconnect enabled='yes' timeout='1'/></source>",
        f"  <target dev='{_disk_name(index)}' bus='virtio'/>",
        f"  <alias name='ua-{escape(name)}'/>",
        "</disk>",
    ]


def _interface(served: Served) -> list[str]:
    packed = " packed='on'" if served.rings.packed else ""
    path = quoteattr(str(served.path))
    return [
        "<interface type='vhostuser'>",
        f"  <source type='unix' path={path} mode='client'><reconnect enabled='yes' timeout='1'/></source>",
        "  <model type='virtio'/>",
        f"  <driver queues='{len(served.device.queues) // 2}'{packed}/>",
        "</interface>",
    ]


def _disk_name(index: int) -> str:
    """vda, ..., vdz, vdaa, ..."""
    letters = ""
    while index >= 0:
        index, letter = divmod(index, 26)
        letters = chr(ord("a") + letter) + letters
        index -= 1
    return f"vd{letters}"
