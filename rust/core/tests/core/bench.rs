//! The driver's side for measuring: a back-end that breaks the rules is a fault, not a crash.

use std::os::fd::AsRawFd;
use std::os::unix::net::UnixStream;
use std::time::Duration;

use pyvirtio_core::bench::{Alarms, Driver as Load, Fault, Geometry, QueueSetup};
use pyvirtio_core::sync::EventFd;

use crate::driver::{Driver, AVAIL, BUFFERS, USED};

const IODEPTH: u16 = 2;

/// A disk whose back-end is the test.
struct Disk {
    ring: Driver,
    eventfds: [EventFd; 3],
    sockets: (UnixStream, Option<UnixStream>),
    blocks: u64,
}

impl Disk {
    fn new() -> Self {
        let eventfds = [(); 3].map(|()| EventFd::new().unwrap());
        let (ours, theirs) = UnixStream::pair().unwrap();
        Self { ring: Driver::with(|ring| ring.indirect = false), eventfds, sockets: (ours, Some(theirs)), blocks: 64 }
    }

    fn run(&self, poll: bool) -> Result<u64, Fault> {
        let [kick, call, err] = &self.eventfds;
        let alarms = Alarms { connection: self.sockets.0.as_raw_fd(), err: err.as_raw_fd() };
        let geometry = Geometry { block_size: 512, blocks: self.blocks, max_iodepth: IODEPTH, alarms };
        let setup = QueueSetup {
            ring: self.ring.config.clone(),
            kick: kick.as_raw_fd(),
            call: call.as_raw_fd(),
            buffers: BUFFERS,
        };
        let load = pyvirtio_core::bench::Load {
            write_percent: 50,
            random: true,
            iodepth: IODEPTH,
            time: Duration::from_secs(60),
            requests: 2,
            poll,
            verify: false,
            seed: 1,
        };
        Load::new(&self.ring.memory, geometry, vec![setup])?.run(&load).map(|outcome| outcome.errors)
    }

    /// What the used ring contains when the driver looks: these heads, and that many.
    fn used(self, heads: &[u32], count: u16) -> Self {
        for (slot, head) in (0..).zip(heads) {
            self.ring.memory.write(USED + 4 + 8 * slot, &head.to_le_bytes()).unwrap();
        }
        self.ring.store(USED + 2, count);
        self
    }
}

#[test]
fn requests_that_come_back_in_another_order_are_counted() {
    let disk = Disk::new().used(&[3, 0], 2);
    assert_eq!(disk.run(true), Ok(2), "both with the status byte as the driver left it");
    assert_eq!(disk.ring.load(AVAIL + 2), 2);
}

#[test]
fn what_was_not_in_flight_is_a_fault() {
    for heads in [[0, 0], [1, 0], [6, 0], [0, u32::MAX]] {
        let fault = Disk::new().used(&heads, 2).run(true).unwrap_err();
        assert_eq!(fault.0, "a request was given back that was not in flight", "{heads:?}");
    }
}

#[test]
fn more_used_than_in_flight_is_a_fault() {
    let fault = Disk::new().used(&[], 3).run(true).unwrap_err();
    assert_eq!(fault.0, "3 requests were given back, and 2 were in flight");
}

#[test]
fn a_back_end_that_goes_or_breaks_ends_the_run() {
    for poll in [false, true] {
        let mut disk = Disk::new();
        disk.eventfds[2].signal();
        assert_eq!(disk.run(poll).unwrap_err().0, "the back-end says that the device is broken");
        disk = Disk::new();
        disk.sockets.1 = None;
        assert_eq!(disk.run(poll).unwrap_err().0, "the back-end hung up");
    }
}

#[test]
fn a_load_that_does_not_fit_the_ring_is_refused() {
    let mut disk = Disk::new();
    disk.ring.config.size = 4;
    assert_eq!(disk.run(true).unwrap_err().0, "iodepth 2 does not fit a ring of 4 descriptors");
}

#[test]
fn an_empty_disk_is_a_fault() {
    let disk = Disk { blocks: 0, ..Disk::new() };
    assert_eq!(disk.run(true), Err(Fault("0 blocks are too few for iodepth 2".into())));
}
