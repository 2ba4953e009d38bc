//! What a network device counts: frames, bytes, and every frame that was dropped, with the reason.

use crate::counters::Counter;

/// Why a frame was dropped.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Reason {
    /// Its header is missing or short, or has offsets past the frame.
    Header,
    /// Its header asks for an offload that was not agreed.
    Offload,
    /// It is shorter than an Ethernet header, or longer than any frame.
    Length,
    /// The host refused it.
    Error,
    /// The link is down.
    Link,
    /// The driver's filter does not let it in.
    Filter,
    /// It is longer than the driver's buffers.
    Buffer,
    /// The queue of injected frames was full, or no driver was there.
    Overflow,
    /// It was waiting for buffers when the driver went away.
    Reset,
}

const SENT: [(&str, Reason); 5] = [
    ("tx_dropped_header", Reason::Header),
    ("tx_dropped_offload", Reason::Offload),
    ("tx_dropped_length", Reason::Length),
    ("tx_dropped_error", Reason::Error),
    ("tx_dropped_link", Reason::Link),
];
const RECEIVED: [(&str, Reason); 9] = [
    ("rx_dropped_header", Reason::Header),
    ("rx_dropped_offload", Reason::Offload),
    ("rx_dropped_length", Reason::Length),
    ("rx_dropped_error", Reason::Error),
    ("rx_dropped_link", Reason::Link),
    ("rx_dropped_filter", Reason::Filter),
    ("rx_dropped_buffer", Reason::Buffer),
    ("rx_dropped_overflow", Reason::Overflow),
    ("rx_dropped_reset", Reason::Reset),
];

/// One direction of one queue pair. A cache line of its own: each is written by another thread.
#[derive(Debug, Default)]
#[repr(align(128))]
pub struct Traffic {
    frames: Counter,
    bytes: Counter,
    dropped: [Counter; RECEIVED.len()],
}

impl Traffic {
    pub fn passed(&self, frames: u64, bytes: u64) {
        self.frames.add(frames);
        self.bytes.add(bytes);
    }

    pub fn dropped(&self, reason: Reason, frames: u64) {
        self.dropped[reason as usize].add(frames);
    }
}

/// The counters of all queue pairs together, by name.
pub fn named<'a>(sent: &[&'a Traffic], received: &[&'a Traffic]) -> Vec<(&'static str, u64)> {
    let mut named = Vec::new();
    let directions =
        [(["tx_frames", "tx_bytes"], sent, &SENT[..]), (["rx_frames", "rx_bytes"], received, &RECEIVED[..])];
    for ([frames, bytes], traffic, reasons) in directions {
        let sum = |of: &dyn Fn(&Traffic) -> u64| traffic.iter().map(|one| of(one)).sum::<u64>();
        named.push((frames, sum(&|one| one.frames.get())));
        named.push((bytes, sum(&|one| one.bytes.get())));
        for (name, reason) in reasons {
            named.push((name, sum(&|one| one.dropped[*reason as usize].get())));
        }
    }
    named
}
