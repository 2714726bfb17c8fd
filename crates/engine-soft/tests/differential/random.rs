//! Random numbers that a seed repeats, and values at which instructions behave differently.

/// xorshift64*.
#[derive(Debug, Clone)]
pub struct Random(u64);

impl Random {
    /// Case `index` of a run with `seed`.
    pub fn of(seed: u64, index: u64) -> Self {
        // SplitMix64's finisher: neighbouring cases have nothing in common.
        let mut z = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15).wrapping_add(index);
        z = (z ^ z >> 30).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ z >> 27).wrapping_mul(0x94d0_49bb_1331_11eb);
        Self((z ^ z >> 31) | 1)
    }

    pub fn next(&mut self) -> u64 {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        self.0.wrapping_mul(0x2545_f491_4f6c_dd1d)
    }

    pub fn below(&mut self, limit: u64) -> u64 {
        (self.next() >> 16) % limit
    }

    /// True in `percent` of a hundred.
    pub fn chance(&mut self, percent: u64) -> bool {
        self.below(100) < percent
    }

    pub fn pick<T: Copy>(&mut self, from: &[T]) -> T {
        from[self.below(from.len() as u64) as usize]
    }

    /// An operand of at most 64 bits.
    pub fn value(&mut self) -> u64 {
        match self.below(8) {
            0 => self.below(4),
            1 => !self.below(4),
            2 => 1 << self.below(64),
            3 => (1u64 << self.below(64)).wrapping_sub(1),
            4 => self.next() & 0xffff_ffff,
            5 => self.pick(&[
                0x7f,
                0x80,
                0xff,
                0x7fff,
                0x8000,
                0xffff,
                0x7fff_ffff,
                0x8000_0000,
                0xffff_ffff,
                0x7fff_ffff_ffff_ffff,
                0x8000_0000_0000_0000,
                0x0000_8000_0000_0000,
            ]),
            6 => self.below(256),
            _ => self.next(),
        }
    }

    /// A quadword that is interesting as integers or as floating-point numbers.
    pub fn lane(&mut self) -> u64 {
        match self.below(4) {
            0 => self.value(),
            1 => self.double(),
            2 => u64::from(self.single()) << 32 | u64::from(self.single()),
            _ => self.next(),
        }
    }

    fn double(&mut self) -> u64 {
        let sign = self.below(2) << 63;
        sign | match self.below(8) {
            0 => 0,
            1 => 0x7ff0_0000_0000_0000,
            2 => 0x7ff8_0000_0000_0000 | self.below(4),
            3 => 0x7ff0_0000_0000_0001 | self.below(1 << 50),
            4 => 1 + self.below(1 << 52),
            5 => 0x7fef_ffff_ffff_ffff,
            _ => (1023 - 40 + self.below(80)) << 52 | self.next() >> 12 << self.below(40) & ((1 << 52) - 1),
        }
    }

    fn single(&mut self) -> u32 {
        let sign = (self.below(2) as u32) << 31;
        sign | match self.below(8) {
            0 => 0,
            1 => 0x7f80_0000,
            2 => 0x7fc0_0000 | self.below(4) as u32,
            3 => 0x7f80_0001 | self.below(1 << 20) as u32,
            4 => 1 + self.below(1 << 22) as u32,
            5 => 0x7f7f_ffff,
            _ => ((127 - 20 + self.below(40)) as u32) << 23 | self.next() as u32 >> 9,
        }
    }

    /// An x87 register: sometimes one that no arithmetic makes.
    pub fn extended(&mut self) -> [u8; 10] {
        let mut bytes = [0; 10];
        let (exponent, significand) = match self.below(8) {
            0 => (0, 0),
            1 => (0x7fff, 1 << 63),
            2 => (0x7fff, 0b11 << 62 | self.below(9)),
            3 => (0x7fff, (1 << 63) | (1 + self.below(1 << 61))),
            4 => (0, self.next()),
            5 => (self.below(0x8000), self.next()),
            _ => (0x3fff - 64 + self.below(128), 1 << 63 | self.next() << self.below(64)),
        };
        bytes[..8].copy_from_slice(&significand.to_le_bytes());
        bytes[8..].copy_from_slice(&((exponent | self.below(2) << 15) as u16).to_le_bytes());
        bytes
    }
}
