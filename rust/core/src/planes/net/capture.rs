//! Frames in a capture file: pcap, link type Ethernet, microseconds.

use std::fs::File;
use std::io::{self, Write};
use std::sync::{Mutex, PoisonError};
use std::time::{SystemTime, UNIX_EPOCH};

use super::segments::{copy_out, total};
use super::MAX_FRAME;
use crate::chain::Segment;
use crate::counters::Counter;

const MAGIC: u32 = 0xA1B2_C3D4;
const VERSION: u32 = 4 << 16 | 2;
const ETHERNET: u32 = 1;
const RECORD: usize = 16;

/// An open capture file. Frames of any thread follow each other in it, each in one write.
pub struct Capture {
    recording: Mutex<Recording>,
    /// Frames that are not in the file: it could not be written, and ends with the last whole record.
    pub missed: Counter,
}

struct Recording {
    file: File,
    record: Vec<u8>,
    failed: bool,
}

impl Capture {
    /// Start the file; what follows in it is ours.
    pub fn new(mut file: File) -> io::Result<Self> {
        file.write_all(&words([MAGIC, VERSION, 0, 0, MAX_FRAME as u32, ETHERNET]))?;
        let recording = Recording { file, record: Vec::new(), failed: false };
        Ok(Self { recording: Mutex::new(recording), missed: Counter::default() })
    }

    /// Append a frame: what is in the buffers, then `rest`.
    pub fn record(&self, frame: &[Segment], rest: &[u8]) {
        let mut recording = self.recording.lock().unwrap_or_else(PoisonError::into_inner);
        if !recording.failed {
            recording.failed = recording.write(frame, rest).is_err();
        }
        self.missed.add(u64::from(recording.failed));
    }
}

impl Recording {
    fn write(&mut self, frame: &[Segment], rest: &[u8]) -> io::Result<()> {
        let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        let length = total(frame) + rest.len();
        self.record.clear();
        self.record.extend(words([now.as_secs() as u32, now.subsec_micros(), length as u32, length as u32]));
        self.record.resize(RECORD + total(frame), 0);
        copy_out(frame, &mut self.record[RECORD..]);
        self.record.extend(rest);
        self.file.write_all(&self.record)
    }
}

fn words<const N: usize>(words: [u32; N]) -> Vec<u8> {
    words.iter().flat_map(|word| word.to_le_bytes()).collect()
}
