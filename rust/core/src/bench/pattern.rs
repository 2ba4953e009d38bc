//! Which blocks are asked for, and what is in them.

/// A small generator of numbers without pattern (splitmix64).
pub struct Random(pub u64);

impl Random {
    pub fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        mix(self.0)
    }

    /// A number below `limit`, all of them about equally often.
    pub fn below(&mut self, limit: u64) -> u64 {
        ((u128::from(self.next()) * u128::from(limit)) >> 64) as u64
    }
}

fn mix(mut x: u64) -> u64 {
    x = (x ^ (x >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    x = (x ^ (x >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    x ^ (x >> 31)
}

/// Fill `out` with what the `generation`th write of a block puts there: no two blocks or generations are alike.
pub fn fill(out: &mut [u8], block: u64, generation: u32) {
    let mut words = Random(mix(block ^ (u64::from(generation) << 40)));
    for word in out.chunks_exact_mut(8) {
        word.copy_from_slice(&words.next().to_le_bytes());
    }
}
