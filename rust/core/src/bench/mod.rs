//! The driver's side of vhost-user devices, for measuring: it fills rings, kicks and reaps as fast as the back-end can.
//!
//! The back-end is trusted with nothing but not to write outside the buffers: what it returns is checked.

mod blk;
mod frame;
mod lane;
mod latency;
mod nbd;
mod net;
mod packed;
mod pattern;
mod ring;
mod verdict;

use std::os::fd::RawFd;
use std::sync::atomic::{AtomicBool, Ordering};

pub use self::blk::{Driver as BlkDriver, Geometry, Load, Outcome, CONTROL_BYTES};
pub use self::latency::Latencies;
pub use self::nbd::NbdClient;
pub use self::net::{Driver as NetDriver, Traffic, Transfer};
pub use self::verdict::Verdict;
use crate::queue::RingConfig;
use crate::GuestError;

/// What a back-end did that it must not; the text is for whoever measures it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Fault(pub String);

impl From<GuestError> for Fault {
    fn from(error: GuestError) -> Self {
        Self(error.0)
    }
}

/// One queue as its front-end has set it up. The file descriptors must stay open as long as the driver lives.
#[derive(Clone)]
pub struct QueueSetup {
    pub ring: RingConfig,
    pub kick: RawFd,
    pub call: RawFd,
    pub alarms: Alarms,
    /// Guest address of the memory for what is offered, a multiple of the page size; the driver says how much it needs.
    pub buffers: u64,
}

/// What tells that there will be no answer.
#[derive(Debug, Clone, Copy)]
pub struct Alarms {
    /// The socket to the back-end, which hangs up.
    pub connection: RawFd,
    /// The err fd of the queue, which the back-end signals.
    pub err: RawFd,
}

/// One queue's part of a run, which ends early once the flag says so.
type Job<'a, T> = Box<dyn FnOnce(&AtomicBool) -> Result<T, Fault> + Send + 'a>;

/// Run each job on a thread of its own. A fault of one ends all of them.
fn together<T: Send>(jobs: Vec<Job<'_, T>>) -> Result<Vec<T>, Fault> {
    let abort = AtomicBool::new(false);
    let abort = &abort;
    std::thread::scope(|scope| {
        let run = |job: Job<'_, T>| {
            let end = job(abort);
            abort.fetch_or(end.is_err(), Ordering::Relaxed);
            end
        };
        let threads: Vec<_> = jobs.into_iter().map(|job| scope.spawn(move || run(job))).collect();
        threads.into_iter().map(|thread| thread.join().expect("it does not panic")).collect()
    })
}
