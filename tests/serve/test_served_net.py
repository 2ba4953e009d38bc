"""A network card behind vhost-user: the front-end answers the control queue, and switches the queues by itself."""

from serving import Serve
from wire import Wire

from pyvirtio.devices.net import Net
from pyvirtio.serve import wire
from pyvirtio.serve.wire import Request
from pyvirtio.spec import NetFeature
from pyvirtio.testing.vhost_user import FrontEnd

NO_CONTROL_QUEUE = ~int(NetFeature.CTRL_VQ | NetFeature.CTRL_RX | NetFeature.CTRL_VLAN)
QUEUES = ("receiveq0", "transmitq0", "receiveq1", "transmitq1")


def test_the_network_sends_on_the_queue_pairs_that_are_enabled(serve: Serve) -> None:
    """On the others nobody would hear it."""
    cable = Wire(2)
    with FrontEnd(serve(Net(cable))) as vm:
        vm.start(QUEUES[:2], features=NO_CONTROL_QUEUE)
        assert cable.active[-1] == 1
        for index in (2, 3):
            vm.set_up_queue(index, QUEUES[index], 64)
        assert cable.active[-1] == 2
        for enable in (0, 1):
            for index in (2, 3):
                vm.acked(Request.SET_VRING_ENABLE, wire.VRING_STATE.pack(index, enable))
            assert cable.active[-1] == 1 + enable
