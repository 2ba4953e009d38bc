//! The driver's side for measuring: a back-end that breaks the rules is a fault, not a crash.

use std::os::fd::AsRawFd;
use std::os::unix::net::UnixStream;
use std::time::Duration;

use pyvirtio_core::bench::{Alarms, BlkDriver, Fault, Geometry, Load, NetDriver, QueueSetup, Traffic, Transfer};
use pyvirtio_core::sync::EventFd;

use crate::driver::{Driver, AVAIL, BUFFERS, USED};

const IODEPTH: u16 = 2;
const ROOM: u32 = 128;
const FRAME: u32 = 64;
const LONG: Duration = Duration::from_secs(60);

/// A queue whose back-end is the test.
struct Queue {
    ring: Driver,
    eventfds: [EventFd; 3],
    sockets: (UnixStream, Option<UnixStream>),
    blocks: u64,
}

impl Queue {
    fn new() -> Self {
        let eventfds = [(); 3].map(|()| EventFd::new().unwrap());
        let (ours, theirs) = UnixStream::pair().unwrap();
        Self { ring: Driver::with(|ring| ring.indirect = false), eventfds, sockets: (ours, Some(theirs)), blocks: 64 }
    }

    fn setup(&self) -> QueueSetup {
        let [kick, call, err] = &self.eventfds;
        QueueSetup {
            ring: self.ring.config.clone(),
            kick: kick.as_raw_fd(),
            call: call.as_raw_fd(),
            alarms: Alarms { connection: self.sockets.0.as_raw_fd(), err: err.as_raw_fd() },
            buffers: BUFFERS,
        }
    }

    /// Read from a queue.
    fn run(&self, poll: bool) -> Result<u64, Fault> {
        self.disk()?.run(&load(poll)).map(|outcome| outcome.errors)
    }

    fn disk(&self) -> Result<BlkDriver, Fault> {
        let geometry = Geometry { block_size: 512, blocks: self.blocks, max_iodepth: IODEPTH };
        BlkDriver::new(&self.ring.memory, geometry, &[self.setup()])
    }

    /// Receive from a network.
    fn receive(&self, poll: bool, time: Duration) -> Result<Traffic, Fault> {
        let transfer = Transfer { frame_size: FRAME, burst: 1, time, poll, verify: true };
        NetDriver::new(&self.ring.memory, ROOM, &[], &[self.setup()], 0)?.run(&transfer)
    }

    /// What the used ring contains when the driver looks: these heads, and that many.
    fn used(self, heads: &[u32], count: u16) -> Self {
        self.written(&heads.iter().map(|head| [*head, 0]).collect::<Vec<_>>(), count)
    }

    /// As `used`, with what was written to each of them.
    fn written(self, entries: &[[u32; 2]], count: u16) -> Self {
        for (slot, [head, length]) in (0..).zip(entries) {
            self.ring.memory.write(USED + 4 + 8 * slot, &head.to_le_bytes()).unwrap();
            self.ring.memory.write(USED + 8 + 8 * slot, &length.to_le_bytes()).unwrap();
        }
        self.ring.store(USED + 2, count);
        self
    }
}

fn load(poll: bool) -> Load {
    Load { write_percent: 50, random: true, iodepth: IODEPTH, time: LONG, requests: 2, poll, verify: false, seed: 1 }
}

#[test]
fn requests_that_come_back_in_another_order_are_counted() {
    let queue = Queue::new().used(&[3, 0], 2);
    assert_eq!(queue.run(true), Ok(2), "both with the status byte as the driver left it");
    assert_eq!(queue.ring.load(AVAIL + 2), 2);
}

#[test]
fn what_was_not_in_flight_is_a_fault() {
    for heads in [[0, 0], [1, 0], [6, 0], [0, u32::MAX]] {
        let fault = Queue::new().used(&heads, 2).run(true).unwrap_err();
        assert_eq!(fault.0, "something was given back that was not in flight", "{heads:?}");
    }
}

#[test]
fn more_used_than_in_flight_is_a_fault() {
    let fault = Queue::new().used(&[], 3).run(true).unwrap_err();
    assert_eq!(fault.0, "3 were given back, and 2 were in flight");
}

#[test]
fn a_back_end_that_goes_or_breaks_ends_the_run() {
    for poll in [false, true] {
        let mut queue = Queue::new();
        queue.eventfds[2].signal();
        assert_eq!(queue.run(poll).unwrap_err().0, "the back-end says that the device is broken");
        queue = Queue::new();
        queue.sockets.1 = None;
        assert_eq!(queue.run(poll).unwrap_err().0, "the back-end hung up");
    }
}

#[test]
fn what_is_in_flight_after_a_fault_is_not_counted_by_the_next_run() {
    let queue = Queue::new();
    queue.eventfds[2].signal();
    let mut disk = queue.disk().unwrap();
    disk.run(&load(true)).unwrap_err();
    queue.eventfds[2].take();
    assert_eq!(disk.run(&load(true)).unwrap_err().0, "requests of a run that failed are in flight still");
}

#[test]
fn a_load_that_does_not_fit_the_ring_is_refused() {
    let mut queue = Queue::new();
    queue.ring.config.size = 4;
    assert_eq!(queue.run(true).unwrap_err().0, "2 times 3 do not fit a ring of 4 descriptors");
}

#[test]
fn a_frame_that_is_shorter_than_its_header_or_longer_than_its_buffer_is_a_fault() {
    for length in [0, 11, ROOM + 1, u32::MAX] {
        let fault = Queue::new().written(&[[0, length]], 1).receive(true, LONG).unwrap_err();
        assert_eq!(fault.0, format!("a frame came with {length} bytes in a buffer of {ROOM}"));
    }
}

#[test]
fn a_buffer_that_the_device_does_not_have_holds_no_frame() {
    let fault = Queue::new().written(&[[1, 12]], 1).receive(true, LONG).unwrap_err();
    assert_eq!(fault.0, "something was given back that was not in flight");
}

#[test]
fn silence_ends_with_the_time() {
    for poll in [false, true] {
        assert_eq!(Queue::new().receive(poll, Duration::ZERO).unwrap().received.frames, 0);
    }
}

#[test]
fn frames_have_to_fit_their_buffers() {
    let queue = Queue::new();
    let mut driver = NetDriver::new(&queue.ring.memory, ROOM, &[queue.setup()], &[], 0).unwrap();
    for frame_size in [59, ROOM - 11] {
        let transfer = Transfer { frame_size, burst: 1, time: Duration::ZERO, poll: true, verify: false };
        let fault = driver.run(&transfer).unwrap_err();
        assert_eq!(fault.0, format!("frames of {frame_size} bytes are not allowed: 60 to 116"));
    }
}

#[test]
fn an_empty_disk_is_a_fault() {
    let queue = Queue { blocks: 0, ..Queue::new() };
    assert_eq!(queue.run(true), Err(Fault("0 blocks are too few for iodepth 2".into())));
}
