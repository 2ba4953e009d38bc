//! libblkio (the crate `blkio`) against a served disk: `blkio_front_end SOCKET`.
//!
//! Its buffers lie in regions that come and go while the queues run, its rings and the headers of requests in another. It
//! writes the whole disk through all queues at once and reads it back into other buffers, each block through another
//! queue than the one that wrote it. What goes wrong ends it with a message.

use std::error::Error;
use std::mem::MaybeUninit;
use std::time::Duration;

use blkio::{Blkio, Blkioq, Completion, MemoryRegion, ReqFlags};
use pyvirtio_core::GuestMemory;

type Outcome<T> = Result<T, Box<dyn Error>>;

const QUEUES: i32 = 2;
/// Without a completion fd: the driver looks at the ring all the time.
const POLLED: i32 = 1;
const BLOCK: usize = 4096;
const HANG: Duration = Duration::from_secs(10);

/// A block for each of the disk's, in a region of their own.
struct Buffers {
    memory: GuestMemory,
    region: MemoryRegion,
}

impl Buffers {
    fn map(disk: &mut Blkio, blocks: usize) -> Outcome<Self> {
        let memory = GuestMemory::allocate(&[(0, (blocks * BLOCK) as u64)])?;
        let found = memory.regions().next().ok_or("no memory")?;
        let region = MemoryRegion {
            addr: found.host as usize,
            iova: 0,
            len: blocks * BLOCK,
            fd: found.fd,
            fd_offset: found.offset as i64,
            flags: 0,
        };
        disk.map_mem_region(&region)?;
        Ok(Self { memory, region })
    }

    fn at(&self, block: usize) -> *mut u8 {
        (self.region.addr + block * BLOCK) as *mut u8
    }
}

fn pattern(block: usize) -> Vec<u8> {
    (0..BLOCK / 8).flat_map(|n| ((block << 32 | n) as u64).to_le_bytes()).collect()
}

fn start(path: &str) -> Outcome<(Blkio, Vec<Blkioq>)> {
    let mut disk = Blkio::new("virtio-blk-vhost-user")?;
    disk.set_str("path", path)?;
    disk.connect()?;
    disk.set_i32("num-queues", QUEUES)?;
    disk.set_i32("num-poll-queues", POLLED)?;
    let started = disk.start()?;
    Ok((disk, started.queues.into_iter().chain(started.poll_queues).collect()))
}

/// Wait for so many answers of each queue, which must all be good.
fn finish(queues: &mut [Blkioq], count: usize) -> Outcome<()> {
    for queue in queues {
        let mut answers: Vec<MaybeUninit<Completion>> = (0..count).map(|_| MaybeUninit::uninit()).collect();
        let done = queue.do_io(&mut answers, count, Some(&mut HANG.clone()), None)?;
        assert_eq!(done, count);
        for answer in &answers {
            // SAFETY: `do_io` has filled as many as it says, which are all.
            let answer = unsafe { answer.assume_init_ref() };
            assert_eq!(answer.ret, 0, "block {}", answer.user_data);
        }
    }
    Ok(())
}

/// Let every queue begin what it has, without waiting for an answer.
fn begin(queues: &mut [Blkioq]) -> Outcome<()> {
    for queue in queues {
        queue.do_io(&mut [], 0, None, None)?;
    }
    Ok(())
}

fn main() -> Outcome<()> {
    let path = std::env::args().nth(1).ok_or("usage: blkio_front_end SOCKET")?;
    let (mut disk, mut queues) = start(&path)?;
    let blocks = disk.get_u64("capacity")? as usize / BLOCK;
    let each = blocks / queues.len();
    assert_eq!(blocks, each * queues.len());

    let written = Buffers::map(&mut disk, blocks)?;
    for block in 0..blocks {
        written.memory.write((block * BLOCK) as u64, &pattern(block))?;
        let queue = &mut queues[block % 3];
        queue.write((block * BLOCK) as u64, written.at(block), BLOCK, block, ReqFlags::empty());
    }
    begin(&mut queues)?;
    let read = Buffers::map(&mut disk, blocks)?;
    finish(&mut queues, each)?;
    queues[0].flush(0, ReqFlags::empty());
    finish(&mut queues[..1], 1)?;

    for block in 0..blocks {
        queues[(block + 1) % 3].read((block * BLOCK) as u64, read.at(block), BLOCK, block, ReqFlags::empty());
    }
    begin(&mut queues)?;
    disk.unmap_mem_region(&written.region);
    finish(&mut queues, each)?;
    for block in 0..blocks {
        let mut back = vec![0; BLOCK];
        read.memory.read((block * BLOCK) as u64, &mut back)?;
        assert_eq!(back, pattern(block), "block {block}");
    }
    println!("served");
    Ok(())
}
