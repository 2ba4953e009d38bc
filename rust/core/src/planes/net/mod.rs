//! virtio-net (virtio 1.3, 5.1): frames between a driver's queues and a network, in both directions.
//!
//! A pass is bounded by the budget of a service. Nothing of the driver is trusted, and of the network's frames only
//! that the kernel tells their true length.

mod capture;
mod counters;
mod filter;
mod header;
mod inbox;
mod line;
mod port;
mod rx;
mod segments;
mod stream;
mod tx;

use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError, RwLock};

pub use self::capture::Capture;
pub use self::counters::Reason;
pub use self::filter::{Filter, Mac};
pub use self::header::{Header, Offloads, HEADER, LEGACY_HEADER};
pub use self::inbox::Inbox;
pub use self::port::{FrameFd, Port, Refused};
pub use self::segments::{copy_out, total};
pub use self::stream::StreamFd;

use self::counters::{named, Traffic};
use self::line::{Direction, Line};
use self::rx::Landing;
use crate::iothread::IoThread;
use crate::queue::{Handler, VirtQueue};

/// Addresses and type: the least a frame has.
const ETHERNET: usize = 14;
/// An IP packet of 65535 bytes behind an Ethernet header with two VLAN tags.
pub const MAX_FRAME: usize = 65535 + ETHERNET + 8;
/// Segments of a frame that are read or written in one call: IOV_MAX, less the header and the landing.
const MAX_SEGMENTS: usize = 1022;

const F_CSUM: u32 = 0;
const F_GUEST_CSUM: u32 = 1;
const F_GUEST_TSO4: u32 = 7;
const F_GUEST_TSO6: u32 = 8;
const F_GUEST_ECN: u32 = 9;
const F_HOST_TSO4: u32 = 11;
const F_HOST_TSO6: u32 = 12;
const F_HOST_ECN: u32 = 13;
const F_MRG_RXBUF: u32 = 15;
const F_VERSION_1: u32 = 32;
const F_GUEST_USO4: u32 = 54;
const F_GUEST_USO6: u32 = 55;
const F_HOST_USO: u32 = 56;

/// What the driver agreed to.
#[derive(Debug, Clone, Copy)]
struct Config {
    /// Bytes of the header before each frame in its buffers: `HEADER` or `LEGACY_HEADER`.
    header: usize,
    /// A frame may take several receive buffers.
    merge: bool,
    from_driver: Offloads,
    to_driver: Offloads,
}

impl Config {
    /// From the feature bits (5.1.3).
    fn agreed(features: u64) -> Self {
        let has = |bit: u32| features >> bit & 1 != 0;
        let from_driver = Offloads {
            csum: has(F_CSUM),
            tso4: has(F_HOST_TSO4),
            tso6: has(F_HOST_TSO6),
            ecn: has(F_HOST_ECN),
            uso: has(F_HOST_USO),
        };
        let to_driver = Offloads {
            csum: has(F_GUEST_CSUM),
            tso4: has(F_GUEST_TSO4),
            tso6: has(F_GUEST_TSO6),
            ecn: has(F_GUEST_ECN),
            // A header does not say which version of IP its UDP is over.
            uso: has(F_GUEST_USO4) && has(F_GUEST_USO6),
        };
        let merge = has(F_MRG_RXBUF);
        let header = if merge || has(F_VERSION_1) { HEADER } else { LEGACY_HEADER };
        Self { header, merge, from_driver, to_driver }
    }
}

/// Serves the receive and transmit queues of a network device: queue 2n receives for pair n, queue 2n + 1 sends.
pub struct NetPlane {
    shared: Shared,
    pairs: Vec<Pair>,
    /// Queue pairs that the driver uses.
    active: AtomicUsize,
    open: AtomicBool,
}

/// What all queue pairs share.
struct Shared {
    config: RwLock<Config>,
    filter: RwLock<Arc<Filter>>,
    link_up: AtomicBool,
    capture: Option<Capture>,
}

/// A receive queue and a transmit queue on one port.
struct Pair {
    port: Arc<dyn Port>,
    landing: Mutex<Landing>,
    receiving: Arc<Line>,
    sending: Arc<Line>,
    received: Traffic,
    sent: Traffic,
}

impl Shared {
    fn config(&self) -> Config {
        *self.config.read().unwrap_or_else(PoisonError::into_inner)
    }

    fn filter(&self) -> Arc<Filter> {
        self.filter.read().unwrap_or_else(PoisonError::into_inner).clone()
    }

    fn link_up(&self) -> bool {
        self.link_up.load(Ordering::Relaxed)
    }
}

impl Pair {
    fn new(port: Arc<dyn Port>) -> Self {
        Self {
            landing: Mutex::new(Landing::new()),
            receiving: Line::new(port.clone(), Direction::Receive),
            sending: Line::new(port.clone(), Direction::Send),
            received: Traffic::default(),
            sent: Traffic::default(),
            port,
        }
    }
}

impl NetPlane {
    /// One port for each queue pair. Every frame is recorded to `capture` as it passes.
    pub fn new(ports: Vec<Arc<dyn Port>>, capture: Option<Capture>) -> Self {
        let shared = Shared {
            config: RwLock::new(Config::agreed(0)),
            filter: RwLock::default(),
            link_up: AtomicBool::new(true),
            capture,
        };
        Self {
            shared,
            pairs: ports.into_iter().map(Pair::new).collect(),
            active: AtomicUsize::new(1),
            open: AtomicBool::new(false),
        }
    }

    /// A driver is there, and agreed to `features`. `threads` wait for the ports, one for each queue pair.
    pub fn open(&self, features: u64, threads: &[Arc<IoThread>]) {
        self.set_features(features);
        for (pair, thread) in self.pairs.iter().zip(threads) {
            pair.receiving.open(thread.clone());
            pair.sending.open(thread.clone());
        }
        self.open.store(true, Ordering::SeqCst);
    }

    /// Whether a driver is there.
    pub fn is_open(&self) -> bool {
        self.open.load(Ordering::SeqCst)
    }

    /// The driver is gone: no queue is served, and no port is watched any more.
    pub fn close(&self) {
        self.open.store(false, Ordering::SeqCst);
        for pair in &self.pairs {
            pair.receiving.close();
            pair.sending.close();
            let waited = pair.landing.lock().unwrap_or_else(PoisonError::into_inner).clear();
            pair.received.dropped(Reason::Reset, u64::from(waited) + pair.port.discard() as u64);
        }
        self.active.store(1, Ordering::SeqCst);
        self.set_filter(Filter::default());
    }

    /// The device is gone: give back what the ports hold of the host.
    pub fn disconnect(&self) {
        for pair in &self.pairs {
            pair.port.close();
        }
    }

    /// Offloads may change while the driver is there (VIRTIO_NET_F_CTRL_GUEST_OFFLOADS).
    pub fn set_features(&self, features: u64) {
        *self.shared.config.write().unwrap_or_else(PoisonError::into_inner) = Config::agreed(features);
    }

    pub fn set_filter(&self, filter: Filter) {
        *self.shared.filter.write().unwrap_or_else(PoisonError::into_inner) = Arc::new(filter);
    }

    /// While the link is down all frames are dropped.
    pub fn set_link(&self, up: bool) {
        self.shared.link_up.store(up, Ordering::Relaxed);
    }

    /// Receive for the first `pairs` queue pairs only.
    pub fn set_active(&self, pairs: usize) {
        let before = self.active.swap(pairs, Ordering::SeqCst);
        for pair in self.pairs.iter().take(pairs).skip(before) {
            pair.receiving.wake();
        }
    }

    /// Count frames for the driver that never reached a queue.
    pub fn dropped(&self, reason: Reason, frames: usize) {
        self.pairs[0].received.dropped(reason, frames as u64);
    }

    pub fn counters(&self) -> Vec<(&'static str, u64)> {
        let sent: Vec<_> = self.pairs.iter().map(|pair| &pair.sent).collect();
        let received: Vec<_> = self.pairs.iter().map(|pair| &pair.received).collect();
        let mut counters = named(&sent, &received);
        if let Some(capture) = &self.shared.capture {
            counters.push(("pcap_missed", capture.missed.get()));
        }
        counters
    }
}

impl Handler for NetPlane {
    fn handle(&self, vq: &Arc<VirtQueue>) {
        let index = usize::from(vq.index());
        let Some(pair) = self.pairs.get(index / 2) else {
            return;
        };
        let result = match index % 2 {
            0 => pair.receive(&self.shared, vq, index / 2 < self.active.load(Ordering::SeqCst)),
            _ => pair.transmit(&self.shared, vq),
        };
        if let Err(reason) = result {
            vq.state().fail(&format!("{}: {reason}", vq.name()));
        }
    }
}
