//! The CPU's time stamp counter: TCG shows it to its guest unscaled, and the lab has to tell it the rate.

/// What RDTSC reads.
pub fn tsc() -> u64 {
    // SAFETY: every x86-64 CPU has the instruction, and it touches no memory; where it is forbidden, it traps.
    unsafe { std::arch::x86_64::_rdtsc() }
}
