//! The "half MD4" directory hash (kernel docs: ext4/directory, hash tree directories). It spreads names over htree
//! leaves and is no cryptography.

/// The hash of `name` as (major, minor), with signed characters as x86 kernels have them.
pub(crate) fn half_md4(name: &[u8], seed: &[u8; 16]) -> (u32, u32) {
    let mut state = initial_state(seed);
    let mut rest = name;
    loop {
        mix(&mut state, &words(rest));
        rest = rest.get(32..).unwrap_or_default();
        if rest.is_empty() {
            break;
        }
    }
    let [_, major, minor, _] = state;
    // The lowest bit is the htree's collision flag, and the topmost even value means "end of directory".
    let major = major & !1;
    (if major == 0xffff_fffe { 0xffff_fffc } else { major }, minor)
}

fn initial_state(seed: &[u8; 16]) -> [u32; 4] {
    if *seed == [0; 16] {
        return [0x6745_2301, 0xefcd_ab89, 0x98ba_dcfe, 0x1032_5476];
    }
    let mut state = [0; 4];
    for (word, bytes) in state.iter_mut().zip(seed.as_chunks::<4>().0) {
        *word = u32::from_le_bytes(*bytes);
    }
    state
}

/// Eight words from up to 32 characters; what is missing is filled with the length.
fn words(rest: &[u8]) -> [u32; 8] {
    let length = (rest.len() as u32) & 0xff;
    let fill = length.wrapping_mul(0x0101_0101);
    let mut words = [fill; 8];
    let characters = rest.get(..32).unwrap_or(rest);
    for (word, four) in words.iter_mut().zip(characters.chunks(4)) {
        for &character in four {
            let signed = i32::from(character.cast_signed()).cast_unsigned();
            *word = (*word << 8).wrapping_add(signed);
        }
    }
    words
}

fn mix(state: &mut [u32; 4], input: &[u32; 8]) {
    const K2: u32 = 0x5a82_7999;
    const K3: u32 = 0x6ed9_eba1;
    let choose = |x: u32, y: u32, z: u32| z ^ (x & (y ^ z));
    let majority = |x: u32, y: u32, z: u32| (x & y).wrapping_add((x ^ y) & z);
    let parity = |x: u32, y: u32, z: u32| x ^ y ^ z;
    let [i0, i1, i2, i3, i4, i5, i6, i7] = *input;
    let mut next = *state;
    round(&mut next, choose, 0, [i0, i1, i2, i3, i4, i5, i6, i7], [3, 7, 11, 19]);
    round(&mut next, majority, K2, [i1, i3, i5, i7, i0, i2, i4, i6], [3, 5, 9, 13]);
    round(&mut next, parity, K3, [i3, i7, i2, i6, i1, i5, i0, i4], [3, 9, 11, 15]);
    for (word, add) in state.iter_mut().zip(next) {
        *word = word.wrapping_add(add);
    }
}

fn round(state: &mut [u32; 4], f: impl Fn(u32, u32, u32) -> u32, k: u32, input: [u32; 8], shifts: [u32; 4]) {
    for (&word, &shift) in input.iter().zip(shifts.iter().cycle()) {
        let [a, b, c, d] = *state;
        let a = a.wrapping_add(f(b, c, d)).wrapping_add(word).wrapping_add(k).rotate_left(shift);
        *state = [d, a, b, c];
    }
}
