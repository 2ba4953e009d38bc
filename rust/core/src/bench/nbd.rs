//! The client of an NBD server under load (the transmission phase of its protocol, simple replies).

use std::fs::File;
use std::io::{BufReader, Read, Write};
use std::time::{Duration, Instant};

use super::blk::{Load, Outcome};
use super::pattern::Random;
use super::Fault;

const REQUEST_MAGIC: u32 = 0x2560_9513;
const REPLY_MAGIC: u32 = 0x6744_6698;
const CMD_READ: u16 = 0;
const CMD_WRITE: u16 = 1;
const REPLY_BYTES: usize = 16;
const BUFFER: usize = 256 << 10;

/// A connection that has been negotiated. `blocks` of `block_size` bytes are used, from the beginning of the disk.
pub struct NbdClient {
    to: File,
    from: BufReader<File>,
    block_size: u32,
    blocks: u64,
}

/// When a request was sent, and whether it writes.
type Sent = (Duration, bool);

impl NbdClient {
    /// `socket` is connected and blocking.
    pub fn new(socket: File, block_size: u32, blocks: u64) -> std::io::Result<Self> {
        let from = BufReader::with_capacity(BUFFER, socket.try_clone()?);
        Ok(Self { to: socket, from, block_size, blocks })
    }

    /// Keep `iodepth` requests in flight until the load ends, then wait for the last. Polling and verifying are not for
    /// NBD, and ignored.
    pub fn run(&mut self, load: &Load) -> Result<Outcome, Fault> {
        let (begin, mut random) = (Instant::now(), Random(load.seed));
        let mut outcome = Outcome::default();
        let mut sent: Vec<Option<Sent>> = vec![None; load.iodepth.into()];
        let mut free: Vec<usize> = (0..sent.len()).rev().collect();
        let (mut offered, mut next) = (0, 0);
        loop {
            let (now, mut requests) = (begin.elapsed(), Vec::new());
            while offered == 0 || now < load.time && offered < load.requests {
                let Some(slot) = free.pop() else { break };
                let write = load.write_percent > 0 && random.below(100) < load.write_percent.into();
                let block = if load.random { random.below(self.blocks) } else { next };
                next = (next + 1) % self.blocks;
                self.request(&mut requests, slot, write, block);
                sent[slot] = Some((now, write));
                offered += 1;
            }
            self.to.write_all(&requests)?;
            if free.len() == sent.len() {
                outcome.elapsed = begin.elapsed();
                return Ok(outcome);
            }
            // One at least, and all that have come with it.
            loop {
                let (slot, failed) = self.reply(&mut sent, &mut outcome, begin)?;
                outcome.errors += u64::from(failed);
                free.push(slot);
                if self.from.buffer().len() < REPLY_BYTES {
                    break;
                }
            }
        }
    }

    fn request(&self, out: &mut Vec<u8>, slot: usize, write: bool, block: u64) {
        out.extend(REQUEST_MAGIC.to_be_bytes());
        out.extend([0; 2]);
        out.extend(if write { CMD_WRITE } else { CMD_READ }.to_be_bytes());
        out.extend((slot as u64).to_be_bytes());
        out.extend((block * u64::from(self.block_size)).to_be_bytes());
        out.extend(self.block_size.to_be_bytes());
        if write {
            out.resize(out.len() + self.block_size as usize, slot as u8);
        }
    }

    /// The slot of the next reply, and whether the request failed.
    fn reply(&mut self, sent: &mut [Option<Sent>], out: &mut Outcome, begin: Instant) -> Result<(usize, bool), Fault> {
        let mut head = [0; REPLY_BYTES];
        self.from.read_exact(&mut head)?;
        let head = u128::from_be_bytes(head);
        let (magic, error, handle) = ((head >> 96) as u32, (head >> 64) as u32, head as u64);
        let slot = usize::try_from(handle).unwrap_or(usize::MAX);
        let request = sent.get_mut(slot).and_then(Option::take);
        let Some((since, write)) = request.filter(|_| magic == REPLY_MAGIC) else {
            return Err(Fault(format!("reply {magic:#x} to request {handle}, which was not in flight")));
        };
        if !write && error == 0 {
            std::io::copy(&mut (&mut self.from).take(self.block_size.into()), &mut std::io::sink())?;
        }
        out.latencies.record((begin.elapsed() - since).as_nanos() as u64);
        out.reads += u64::from(!write);
        out.writes += u64::from(write);
        Ok((slot, error != 0))
    }
}

impl From<std::io::Error> for Fault {
    fn from(error: std::io::Error) -> Self {
        Self(format!("the connection broke: {error}"))
    }
}
