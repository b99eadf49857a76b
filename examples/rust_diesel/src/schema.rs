diesel::table! {
    account (id) {
        id -> BigInt,
        owner -> Text,
        balance -> BigInt,
    }
}
