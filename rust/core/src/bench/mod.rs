//! The driver's side of vhost-user-blk, for measuring: it fills rings, kicks and reaps as fast as the back-end can.
//!
//! The back-end is trusted with nothing but not to write outside the buffers: what it returns is checked.

mod latency;
mod nbd;
mod packed;
mod pattern;
mod queue;
mod ring;

use std::os::fd::RawFd;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

pub use self::latency::Latencies;
pub use self::nbd::NbdClient;
use self::queue::Queue;
use crate::memory::GuestMemory;
use crate::queue::RingConfig;

/// What a back-end did that it must not; the text is for whoever measures it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Fault(pub String);

/// One queue as its front-end has set it up. The file descriptors must stay open as long as the driver lives.
pub struct QueueSetup {
    pub ring: RingConfig,
    pub kick: RawFd,
    pub call: RawFd,
    /// Guest address of `iodepth * (block_size + CONTROL_BYTES)` bytes for requests; a multiple of the page size.
    pub buffers: u64,
}

/// Bytes of guest memory that a request needs besides its data: header, status and indirect table.
pub const CONTROL_BYTES: u64 = queue::CONTROL_BYTES;

/// What all loads of a driver have in common.
#[derive(Debug, Clone, Copy)]
pub struct Geometry {
    pub block_size: u32,
    /// Blocks of the disk that are used, from its beginning.
    pub blocks: u64,
    pub max_iodepth: u16,
    pub alarms: Alarms,
}

/// What tells that there will be no answer.
#[derive(Debug, Clone, Copy)]
pub struct Alarms {
    /// The socket to the back-end, which hangs up.
    pub connection: RawFd,
    /// The err fd of the queues, which the back-end signals.
    pub err: RawFd,
}

/// What one run does. It ends after `time` or `requests` of each queue, whichever comes first.
#[derive(Debug, Clone, Copy)]
pub struct Load {
    pub write_percent: u8,
    pub random: bool,
    pub iodepth: u16,
    pub time: Duration,
    pub requests: u64,
    /// Look at the used ring all the time; else sleep until the back-end interrupts.
    pub poll: bool,
    /// Write what can be told from anything else, and check what is read where it was written before.
    pub verify: bool,
    pub seed: u64,
}

/// What a run found.
#[derive(Debug, Default)]
pub struct Outcome {
    pub reads: u64,
    pub writes: u64,
    /// Requests that the back-end answered with an error.
    pub errors: u64,
    pub kicks: u64,
    pub interrupts: u64,
    pub latencies: Latencies,
    pub elapsed: Duration,
}

impl Outcome {
    fn add(&mut self, other: &Self) {
        self.reads += other.reads;
        self.writes += other.writes;
        self.errors += other.errors;
        self.kicks += other.kicks;
        self.interrupts += other.interrupts;
        self.latencies.add(&other.latencies);
    }
}

/// A driver of any number of queues, each on a thread of its own while a load runs.
pub struct Driver {
    queues: Vec<Queue>,
    alarms: Alarms,
}

impl Driver {
    pub fn new(memory: &GuestMemory, geometry: Geometry, setups: Vec<QueueSetup>) -> Result<Self, Fault> {
        let share = geometry.blocks / (setups.len() as u64).max(1);
        let queues = setups
            .into_iter()
            .zip(0..)
            .map(|(setup, n)| Queue::new(memory, geometry, setup, n * share..(n + 1) * share))
            .collect::<Result<_, _>>()?;
        Ok(Self { queues, alarms: geometry.alarms })
    }

    /// Run a load to its end, with nothing in flight before and after. A fault of any queue ends all of them.
    pub fn run(&mut self, load: &Load) -> Result<Outcome, Fault> {
        let abort = AtomicBool::new(false);
        let (begin, alarms) = (Instant::now(), self.alarms);
        let ends: Vec<Result<Outcome, Fault>> = std::thread::scope(|scope| {
            let start = |queue| {
                scope.spawn(|| {
                    let end = Queue::run(queue, load, alarms, &abort);
                    abort.fetch_or(end.is_err(), Ordering::Relaxed);
                    end
                })
            };
            let threads: Vec<_> = self.queues.iter_mut().map(start).collect();
            threads.into_iter().map(|thread| thread.join().expect("it does not panic")).collect()
        });
        let mut all = Outcome { elapsed: begin.elapsed(), ..Outcome::default() };
        for end in ends {
            all.add(&end?);
        }
        Ok(all)
    }
}
