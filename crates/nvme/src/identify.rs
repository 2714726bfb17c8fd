//! What Identify and Get Log Page answer (sections 5.14 and 5.15).

use crate::data::PAGES_SHIFT_MAX;
use crate::spec::VERSION;

/// A data page under construction.
pub struct Page<const N: usize>([u8; N]);

impl<const N: usize> Page<N> {
    pub fn new() -> Self {
        Self([0; N])
    }

    /// Puts bytes at an offset; what does not fit is cut.
    pub fn put(&mut self, at: usize, bytes: &[u8]) -> &mut Self {
        for (to, from) in self.0.iter_mut().skip(at).zip(bytes) {
            *to = *from;
        }
        self
    }

    /// Puts ASCII, padded with spaces (section 1.6).
    fn text(&mut self, at: usize, width: usize, text: &str) -> &mut Self {
        self.put(at, &vec![b' '; width])
            .put(at, text.as_bytes().get(..width.min(text.len())).unwrap_or_default())
    }

    pub fn bytes(&self) -> &[u8] {
        &self.0
    }
}

/// What the namespace is.
#[derive(Debug, Clone)]
pub struct Namespace {
    /// Blocks.
    pub blocks: u64,
    /// log2 of the block size in bytes.
    pub block_shift: u32,
    pub uuid: [u8; 16],
}

/// Identify controller.
pub fn controller(serial: &str, uuid: &[u8; 16], discard: bool) -> Page<4096> {
    let mut page = Page::new();
    // Dataset management and write zeroes.
    let optional: u16 = if discard { 1 << 2 | 1 << 3 } else { 1 << 3 };
    page.put(0, &0x1b36u16.to_le_bytes())
        .put(2, &0x1af4u16.to_le_bytes())
        .text(4, 20, serial)
        .text(24, 40, "yado NVMe disk")
        .text(64, 8, "1")
        .put(77, &[PAGES_SHIFT_MAX])
        .put(78, &1u16.to_le_bytes())
        .put(80, &VERSION.to_le_bytes())
        // An I/O controller; limits of abort and asynchronous events, less one; one firmware slot, read only.
        .put(111, &[1])
        .put(258, &[3, 3, 3])
        // Warning and critical temperature: 343 and 353 K.
        .put(266, &343u16.to_le_bytes())
        .put(268, &353u16.to_le_bytes())
        // Entry sizes: 64 and 16 bytes; one namespace; a volatile write cache.
        .put(512, &[0x66, 0x44])
        .put(516, &1u32.to_le_bytes())
        .put(520, &optional.to_le_bytes())
        .put(525, &[1])
        .put(768, format!("nqn.2014-08.org.nvmexpress:uuid:{}", hyphenated(uuid)).as_bytes());
    page
}

fn hyphenated(uuid: &[u8; 16]) -> String {
    use std::fmt::Write;
    let mut text = String::with_capacity(36);
    for (index, byte) in uuid.iter().enumerate() {
        if matches!(index, 4 | 6 | 8 | 10) {
            text.push('-');
        }
        // Writing to a string cannot fail.
        let _ = write!(text, "{byte:02x}");
    }
    text
}

/// Identify namespace.
pub fn namespace(namespace: &Namespace, discard: bool, read_only: bool) -> Page<4096> {
    let mut page = Page::new();
    let blocks = namespace.blocks.to_le_bytes();
    // Write zeroes may deallocate. What deallocated blocks read as is not told: where a format discards whole clusters only,
    // or a host knows no holes, they stay as they were.
    let deallocation = if discard { 0b1000 } else { 0 };
    page.put(0, &blocks)
        .put(8, &blocks)
        .put(16, &blocks)
        .put(33, &[deallocation])
        .put(99, &[u8::from(read_only)])
        .put(104, &namespace.uuid)
        .put(128, &(namespace.block_shift << 16).to_le_bytes());
    page
}

/// Namespace identification descriptors: the UUID.
pub fn descriptors(namespace: &Namespace) -> Page<4096> {
    let mut page = Page::new();
    page.put(0, &[3, 16]).put(4, &namespace.uuid);
    page
}

/// SMART / health: all is well.
pub fn smart() -> Page<512> {
    let mut page = Page::new();
    // Composite temperature 300 K, available spare 100 %, threshold 10 %.
    page.put(1, &300u16.to_le_bytes()).put(3, &[100, 10]);
    page
}

/// Firmware slots: slot 1 is active.
pub fn firmware() -> Page<512> {
    let mut page = Page::new();
    page.put(0, &[1]).text(8, 8, "1");
    page
}
